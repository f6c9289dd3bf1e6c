"""Converters: a source model as Hugging Face publishes it into a quantized GGUF."""
