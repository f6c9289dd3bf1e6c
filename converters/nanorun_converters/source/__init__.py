"""The bytes of a source model: local files or ranges of the Hub, as lazy tensors."""
