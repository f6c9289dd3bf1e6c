"""Text to token ids and back, as the model was trained: by the `tokenizers` library."""
