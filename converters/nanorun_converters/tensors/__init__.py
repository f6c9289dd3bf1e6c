"""Which source tensor becomes which GGUF tensor, by which transform."""
