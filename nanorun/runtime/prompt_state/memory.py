"""What the engine and the prefix tree ask of the place where sequences are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nanorun.runtime.llama.row import Row


class SequenceMemory(Protocol):
    """Attention cells and recurrent states by sequence, as the prefix tree moves them.

    `runtime/llama/context.py` is one; with a model's MTP head beside it,
    `runtime/drafting/head_memory.py`.
    """

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


class Memory(SequenceMemory, Protocol):
    """The same, and how sequences grow."""

    def decode(self, rows: Sequence[Row]) -> list[int | None]:
        """Evaluate a batch; see `Context.decode`."""

    def logits_of(self, index: int, n_rows: int) -> NDArray[np.float32]:
        """Logits `(n_rows, n_vocab)` of outputs of the last batch; a view until the next one."""

    def keep(self, kept: Sequence[tuple[Row, int]]) -> None:
        """Keep so many tokens of each row of the last batch, and take the others back."""

    def close(self) -> None:
        """Free it."""
