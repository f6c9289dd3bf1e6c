"""Drafts by the model's own multi-token-prediction head.

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
from nanorun.runtime.drafting.drafter import Guess
from nanorun.runtime.llama.context import CacheFull, Context, Row
from nanorun.runtime.prompt_state.memory import SequenceMemory

# A guess less likely than this is not worth a place in the batch.
_MIN_PROBABILITY = 0.5

Hidden = NDArray[np.float32]


class MtpDrafter:
    """Guesses with the head; is at the same time the memory of both contexts' sequences.

    Args:
        context: The main context, opened with `n_rs_seq` planes for rollbacks.
        options: Sizes of the head's context.
    """

    def __init__(self, context: Context, options: EngineOptions) -> None:
        self.memory: SequenceMemory = self
        self._target = context
        self._head = Context(context.model, options, head_of=context)
        self._n_embd = context.n_embd
        self._hidden: dict[int, Hidden] = {}
        """Hidden state of each sequence's last token."""
        self._of_batch = np.empty((0, self._n_embd), np.float32)
        context.keep_hidden_states()
        self._head.keep_hidden_states(only_outputs=True)

    def close(self) -> None:
        """Free the head's context."""
        self._head.close()

    # -- evaluating -----------------------------------------------------------------------------

    def decode(self, rows: Sequence[Row]) -> list[int | None]:
        """Evaluate a batch in the main context and keep its hidden states."""
        outputs = self._target.decode(rows)
        self._of_batch = self._target.hidden_states(sum(len(row.tokens) for row in rows))
        return outputs

    def follow(self, kept: Sequence[tuple[Row, int]]) -> None:
        """Let the head see the tokens that stay."""
        rows, hidden, start = [], [], 0
        for row, n_kept in kept:
            states = self._of_batch[start : start + n_kept]
            start += len(row.tokens)
            before = self._last_hidden(row.seq_id)
            rows.append(Row(row.seq_id, row.pos, row.tokens[:n_kept], wants_logits=False))
            hidden += [before[None], states[:-1]]
            self._hidden[row.seq_id] = states[-1].copy()
        self._head.decode(rows, np.concatenate(hidden))

    def draft(self, guesses: Sequence[Guess]) -> list[list[int]]:
        """Run the head on its own output, all sequences together, then take that back."""
        drafts: list[list[int]] = [[] for _ in guesses]
        last = [(guess.pending, self._last_hidden(guess.seq_id)) for guess in guesses]
        running = [i for i, guess in enumerate(guesses) if guess.n_most > 0]
        while running:
            rows = [
                Row(g.seq_id, len(g.tokens) + len(drafts[i]), [last[i][0]], wants_logits=True)
                for i, g in ((i, guesses[i]) for i in running)
            ]
            try:
                outputs = self._head.decode(rows, np.stack([last[i][1] for i in running]))
            except CacheFull:  # room is made for the batch, and not before
                break
            going_on = []
            for i, index in zip(running, outputs, strict=True):
                assert index is not None
                token, probability = _likeliest(self._head.logits(index))
                if probability < _MIN_PROBABILITY:
                    continue
                drafts[i].append(token)
                last[i] = (token, self._head.hidden_state(index))
                if len(drafts[i]) < guesses[i].n_most:
                    going_on.append(i)
            running = going_on
        for guess in guesses:
            self._head.remove_tail(guess.seq_id, len(guess.tokens))
        return drafts

    def _last_hidden(self, seq_id: int) -> Hidden:
        found = self._hidden.get(seq_id)
        return np.zeros(self._n_embd, np.float32) if found is None else found

    # -- sequences ------------------------------------------------------------------------------

    def drop(self, seq_id: int) -> None:
        """Forget a whole sequence."""
        self._target.drop(seq_id)
        self._head.drop(seq_id)
        self._hidden.pop(seq_id, None)

    def fork(self, source: int, target: int) -> None:
        """Copy a whole sequence into an empty one."""
        self._target.fork(source, target)
        self._head.fork(source, target)
        self._hidden[target] = self._last_hidden(source)

    def fork_at(self, source: int, target: int, n_tokens: int, state: bytes) -> None:
        """Copy a sequence's beginning into an empty one, given the state of there."""
        hidden, recurrent = self._unpack(state)
        self._target.fork_at(source, target, n_tokens, recurrent)
        self._head.fork(source, target)
        self._head.remove_tail(target, n_tokens)
        self._hidden[target] = hidden

    def rewind(self, seq_id: int, n_tokens: int, state: bytes) -> None:
        """Shorten a sequence, given the state of there."""
        hidden, recurrent = self._unpack(state)
        self._target.rewind(seq_id, n_tokens, recurrent)
        self._head.remove_tail(seq_id, n_tokens)
        self._hidden[seq_id] = hidden

    def settle(self, seq_id: int) -> None:
        """Make a rollback final."""
        self._target.settle(seq_id)

    def recurrent_state(self, seq_id: int) -> bytes:
        """The hidden and recurrent state of a sequence's end."""
        return self._last_hidden(seq_id).tobytes() + self._target.recurrent_state(seq_id)

    def full_state(self, seq_id: int) -> bytes:
        """Everything of a sequence, in both contexts."""
        main = self._target.full_state(seq_id)
        head = self._head.full_state(seq_id)
        return self._last_hidden(seq_id).tobytes() + struct.pack("<Q", len(main)) + main + head

    def restore(self, seq_id: int, state: bytes) -> None:
        """Fill an empty sequence from `full_state`."""
        hidden, rest = self._unpack(state)
        (n_main,) = struct.unpack_from("<Q", rest)
        self._target.restore(seq_id, rest[8 : 8 + n_main])
        self._head.restore(seq_id, rest[8 + n_main :])
        self._hidden[seq_id] = hidden

    def _unpack(self, state: bytes) -> tuple[Hidden, bytes]:
        n_bytes = self._n_embd * 4
        return np.frombuffer(state[:n_bytes], np.float32).copy(), state[n_bytes:]


def _likeliest(logits: NDArray[np.float32]) -> tuple[int, float]:
    """The likeliest token and its probability."""
    token = int(logits.argmax())
    return token, float(1 / np.exp(logits - logits[token]).sum(dtype=np.float64))
