"""Guesses by the model's own multi-token-prediction head (`head_memory.py` says what that is)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nanorun.runtime.drafting.drafter import DraftRequest
from nanorun.runtime.drafting.head_memory import HeadMemory
from nanorun.runtime.llama.context import CacheFull
from nanorun.runtime.llama.row import Row

# A guess less likely than this is not worth a place in the batch.
_MIN_PROBABILITY = 0.5


class MtpDrafter:
    """Runs the head on its own output.

    Args:
        memory: The sequences of model and head.
    """

    def __init__(self, memory: HeadMemory) -> None:
        self._memory = memory
        self._head = memory.head

    def draft(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """Guess for all sequences together, then take what the head evaluated back."""
        drafts: list[list[int]] = [[] for _ in requests]
        last = [(r.pending, self._memory.last_hidden(r.seq_id)) for r in requests]
        running = [i for i, request in enumerate(requests) if request.n_most > 0]
        while running:
            rows = [
                Row(r.seq_id, len(r.tokens) + len(drafts[i]), [last[i][0]], wants_logits=True)
                for i, r in ((i, requests[i]) for i in running)
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
                if len(drafts[i]) < requests[i].n_most:
                    going_on.append(i)
            running = going_on
        for request in requests:
            self._head.remove_tail(request.seq_id, len(request.tokens))
        return drafts


def _likeliest(logits: NDArray[np.float32]) -> tuple[int, float]:
    """The likeliest token and its probability, from logits `(n_vocab,)`."""
    token = int(logits.argmax())
    return token, float(1 / np.exp(logits - logits[token]).sum(dtype=np.float64))
