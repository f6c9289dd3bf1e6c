"""The sequences of a model and of its multi-token-prediction head, kept together.

The head is one more block that sees a token and the trunk's hidden state of the token before it,
and predicts the token after. It has a context and a KV cache of its own, which have to go through
everything that the sequences of the main context go through; its calls are those of engine.md §8
and llama.cpp's `common/speculative.cpp`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.llama.context import Context
from nanorun.runtime.llama.row import Row

Hidden = NDArray[np.float32]
"""The trunk's hidden state after a token, shape `(n_embd,)`."""


class HeadMemory:
    """A `Memory` of two contexts.

    Args:
        context: The main context, opened with `n_rs_seq` planes for rollbacks; closed with this.
        options: Sizes of the head's context.
    """

    def __init__(self, context: Context, options: EngineOptions) -> None:
        self._target = context
        self.head = Context(context.model, options, head_of=context)
        self._n_embd = context.n_embd
        self._hidden: dict[int, Hidden] = {}
        """Hidden state of each sequence's last token."""
        self._of_batch = np.empty((0, self._n_embd), np.float32)
        context.keep_hidden_states()
        self.head.keep_hidden_states(only_outputs=True)

    def close(self) -> None:
        """Free both contexts."""
        self.head.close()
        self._target.close()

    def last_hidden(self, seq_id: int) -> Hidden:
        """The hidden state of a sequence's last token, zeros before its first."""
        found = self._hidden.get(seq_id)
        return np.zeros(self._n_embd, np.float32) if found is None else found

    # -- growth -----------------------------------------------------------------------------------

    def decode(self, rows: Sequence[Row]) -> list[int | None]:
        """Evaluate a batch in the main context and keep its hidden states."""
        outputs = self._target.decode(rows)
        self._of_batch = self._target.hidden_states(sum(len(row.tokens) for row in rows))
        return outputs

    def logits_of(self, index: int, n_rows: int) -> NDArray[np.float32]:
        """Logits `(n_rows, n_vocab)` of the main context."""
        return self._target.logits_of(index, n_rows)

    def keep(self, kept: Sequence[tuple[Row, int]]) -> None:
        """Take back what does not stay, and let the head see what does."""
        self._target.keep(kept)
        rows, hidden, start = [], [], 0
        for row, n_kept in kept:
            states = self._of_batch[start : start + n_kept]
            start += len(row.tokens)
            before = self.last_hidden(row.seq_id)
            rows.append(Row(row.seq_id, row.pos, row.tokens[:n_kept], wants_logits=False))
            hidden += [before[None], states[:-1]]
            self._hidden[row.seq_id] = states[-1].copy()
        self.head.decode(rows, np.concatenate(hidden))

    # -- sequences --------------------------------------------------------------------------------

    def drop(self, seq_id: int) -> None:
        """Forget a whole sequence."""
        self._target.drop(seq_id)
        self.head.drop(seq_id)
        self._hidden.pop(seq_id, None)

    def fork(self, source: int, target: int) -> None:
        """Copy a whole sequence into an empty one."""
        self._target.fork(source, target)
        self.head.fork(source, target)
        self._hidden[target] = self.last_hidden(source)

    def fork_at(self, source: int, target: int, n_tokens: int, state: bytes) -> None:
        """Copy a sequence's beginning into an empty one, given the state of there."""
        hidden, recurrent = self._unpack(state)
        self._target.fork_at(source, target, n_tokens, recurrent)
        self.head.fork(source, target)
        self.head.remove_tail(target, n_tokens)
        self._hidden[target] = hidden

    def rewind(self, seq_id: int, n_tokens: int, state: bytes) -> None:
        """Shorten a sequence, given the state of there."""
        hidden, recurrent = self._unpack(state)
        self._target.rewind(seq_id, n_tokens, recurrent)
        self.head.remove_tail(seq_id, n_tokens)
        self._hidden[seq_id] = hidden

    def settle(self, seq_id: int) -> None:
        """Make a rollback final."""
        self._target.settle(seq_id)

    def recurrent_state(self, seq_id: int) -> bytes:
        """The hidden and recurrent state of a sequence's end."""
        return self.last_hidden(seq_id).tobytes() + self._target.recurrent_state(seq_id)

    def full_state(self, seq_id: int) -> bytes:
        """Everything of a sequence, in both contexts."""
        main = self._target.full_state(seq_id)
        head = self.head.full_state(seq_id)
        return self.last_hidden(seq_id).tobytes() + struct.pack("<Q", len(main)) + main + head

    def restore(self, seq_id: int, state: bytes) -> None:
        """Fill an empty sequence from `full_state`."""
        hidden, rest = self._unpack(state)
        (n_main,) = struct.unpack_from("<Q", rest)
        self._target.restore(seq_id, rest[8 : 8 + n_main])
        self.head.restore(seq_id, rest[8 + n_main :])
        self._hidden[seq_id] = hidden

    def _unpack(self, state: bytes) -> tuple[Hidden, bytes]:
        n_bytes = self._n_embd * 4
        return np.frombuffer(state[:n_bytes], np.float32).copy(), state[n_bytes:]
