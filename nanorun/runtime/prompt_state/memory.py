"""What the prefix tree asks of the engine's context."""

from __future__ import annotations

from typing import Protocol


class SequenceMemory(Protocol):
    """Attention cells and recurrent states by sequence; see `runtime/llama/context.py`."""

    def drop(self, seq_id: int) -> None:
        """Forget a whole sequence."""

    def fork(self, source: int, target: int) -> None:
        """Copy a whole sequence into an empty one."""

    def fork_at(self, source: int, target: int, n_tokens: int, state: bytes) -> None:
        """Copy a sequence's beginning into an empty one, given the recurrent state of there."""

    def rewind(self, seq_id: int, n_tokens: int, state: bytes) -> None:
        """Shorten a sequence, given the recurrent state of there."""

    def settle(self, seq_id: int) -> None:
        """Make a rollback final; before, the sequence cannot be forked."""

    def recurrent_state(self, seq_id: int) -> bytes:
        """The recurrent state of a sequence's end."""

    def full_state(self, seq_id: int) -> bytes:
        """Everything of a sequence."""

    def restore(self, seq_id: int, state: bytes) -> None:
        """Fill an empty sequence from `full_state`."""
