"""A tokenizer for grammars whose tokens are the bytes, and a few control tokens after them."""

from __future__ import annotations

from llguidance import LLTokenizer, TokenizerWrapper

N_BYTES = 256
"""The id of the first control token."""


class _Bytes:
    bos_token_id = None

    def __init__(self, special: tuple[bytes, ...], eos: bytes) -> None:
        self.tokens = [*(bytes([i]) for i in range(N_BYTES)), *special]
        self.special_token_ids = list(range(N_BYTES, len(self.tokens)))
        self.eos_token_id = self.tokens.index(eos)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def byte_tokenizer(*special: bytes, eos: bytes = b"<|im_end|>") -> LLTokenizer:
    """The tokenizer; `eos` is one of the control tokens."""
    return LLTokenizer(TokenizerWrapper(_Bytes(special, eos)))
