"""Measuring a model: importance matrix, perplexity, divergence, memory."""
