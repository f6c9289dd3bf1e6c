"""Encoders of nanorun's own, for types that ggml decodes well and encodes badly."""
