"""Three doors to a model to convert: a source model, a GGUF, a file of shapes."""
