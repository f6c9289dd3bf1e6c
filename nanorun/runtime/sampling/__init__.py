"""The next token from logits, as the sampling settings ask; no engine."""
