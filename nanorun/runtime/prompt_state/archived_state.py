"""A sequence that left the device: what is known of it, and its state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nanorun.runtime.prompt_state.prefixes import Tokens, n_common


@dataclass(eq=False, slots=True)
class ArchivedState:
    """What is known of an archived sequence without reading its state."""

    tokens: Tokens
    place: Literal["host", "disk"] = "host"
    checkpoint_positions: frozenset[int] = frozenset()
    path: Path | None = None
    """Its file, where it is on disk."""
    is_prefix: bool = False
    """Whether it is kept because many conversations begin with it."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the sequence."""
        return len(self.tokens)

    @property
    def places(self) -> frozenset[int]:
        """Positions that a prompt can start from: the checkpoints and the end."""
        return self.checkpoint_positions | {self.n_tokens}

    def makes_useless(self, other: ArchivedState) -> bool:
        """Whether every prompt that could start from `other` can start from here as well.

        And will be able to as long: a conversation goes before a prefix does.
        """
        n = other.n_tokens
        return (
            (self.is_prefix or not other.is_prefix)
            and self.n_tokens >= n
            and other.places <= self.places
            and n_common(self.tokens, other.tokens) == n
        )


@dataclass(frozen=True, slots=True)
class StatePayload:
    """A sequence's state: KV and recurrent part of its end, and the states saved along it."""

    full: bytes
    checkpoints: Mapping[int, bytes] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Memory it takes."""
        return len(self.full) + sum(len(state) for state in self.checkpoints.values())
