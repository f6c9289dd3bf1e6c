"""What a reply has to know of the model's tokens."""

from __future__ import annotations

from typing import Protocol


class Vocabulary(Protocol):
    """Tokens and their bytes; a loaded model is one."""

    @property
    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a reply."""

    @property
    def control_tokens(self) -> frozenset[int]:
        """Tokens that are markup, never text."""

    @property
    def closing_after_text(self) -> tuple[int, ...]:
        r"""Tokens that end thinking where text stands before them (`\n</think>\n`)."""

    @property
    def closing_after_newline(self) -> tuple[int, ...]:
        r"""Tokens that end thinking where a line has just ended (`</think>\n`)."""

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for."""
