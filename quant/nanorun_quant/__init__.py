"""Quantization: ggml's own quantizers, and recipes that say which tensor gets which type."""
