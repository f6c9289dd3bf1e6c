"""The tokens of a GGUF: their texts, their kinds, and which of them are markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any


class Kind(IntEnum):
    """llama_token_type of llama.h, as `tokenizer.ggml.token_type` stores it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class TokenList:
    """Texts and kinds of all tokens, by id."""

    texts: Sequence[str]
    kinds: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.kinds):
            raise ValueError(f"{len(self.texts)} tokens and {len(self.kinds)} types")

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> TokenList | None:
        """What a GGUF says of them; None if it lists none, or not the kind of each."""
        texts = metadata.get("tokenizer.ggml.tokens")
        kinds = metadata.get("tokenizer.ggml.token_type")
        if not isinstance(texts, list) or not isinstance(kinds, list) or len(texts) != len(kinds):
            return None
        return cls(texts, kinds)

    def markup(self) -> list[tuple[str, int]]:
        """Control tokens, and user-defined ones that look like tags: their texts and kinds."""
        return [
            (text, kind)
            for text, kind in zip(self.texts, self.kinds, strict=True)
            if kind == Kind.CONTROL
            or (kind == Kind.USER_DEFINED and text.startswith("<") and text.endswith(">"))
        ]

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; those of markup are its text.

        Raises:
            IndexError: If there is no such token.
        """
        if token < 0:
            raise IndexError(token)
        text, kind = self.texts[token], self.kinds[token]
        if kind == Kind.UNUSED:
            return b""
        if kind != Kind.NORMAL:
            return text.encode()
        byte_of = _byte_of()
        return b"".join(
            bytes([byte_of[char]]) if char in byte_of else char.encode() for char in text
        )


@cache
def _byte_of() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 as it is, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }
