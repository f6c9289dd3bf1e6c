"""Penalties for what was said, by llama.cpp's own samplers."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanorun.runtime.llama.binding import load_llama
from nanorun.runtime.sampling.draw import Logits
from nanorun.runtime.sampling.settings import SamplingSettings

# llama.cpp's own defaults of the sampler that "don't repeat yourself" (common/common.h).
_DRY_BREAKERS = (b"\n", b":", b'"', b"*")
# DRY looks for sequences, so it looks further back than penalties for single tokens.
_MIN_DRY_TOKENS = 1024
# More tokens than a reply has; the samplers keep a ring of this size.
_WHOLE_REPLY = 2**18
# llama_token_data of llama.h
_CANDIDATE = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])


def build_penalties(
    settings: SamplingSettings, n_vocab: int, vocab: Any = None
) -> LlamaPenalties | None:
    """The penalties that settings ask for; None if what was said changes nothing."""
    return LlamaPenalties(settings, n_vocab, vocab) if settings.has_penalties else None


class LlamaPenalties:
    """llama.cpp's penalty samplers, fed with the tokens of the reply.

    Args:
        settings: The request's values.
        n_vocab: Tokens of the vocabulary.
        vocab: llama.cpp's vocabulary; only the DRY penalty needs it.
    """

    def __init__(self, settings: SamplingSettings, n_vocab: int, vocab: Any) -> None:
        self._llama = llama = load_llama()
        self._candidates = np.zeros(n_vocab, _CANDIDATE)
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        for link in self._links(settings, n_vocab, vocab):
            llama.llama_sampler_chain_add(self._chain, link)

    def _links(self, s: SamplingSettings, n_vocab: int, vocab: Any) -> list[Any]:
        llama = self._llama
        n_back = _WHOLE_REPLY if s.penalty_last_n < 0 else s.penalty_last_n
        links = [
            llama.llama_sampler_init_penalties(
                n_vocab, n_back, s.repetition_penalty, s.frequency_penalty, s.presence_penalty
            )
        ]
        if s.dry_multiplier > 0:
            breakers = (ctypes.c_char_p * len(_DRY_BREAKERS))(*_DRY_BREAKERS)
            links.append(
                llama.llama_sampler_init_dry(
                    vocab, s.dry_multiplier, s.dry_base, s.dry_allowed_length,
                    _WHOLE_REPLY if s.penalty_last_n < 0 else max(n_back, _MIN_DRY_TOKENS),
                    breakers, len(breakers),
                )
            )  # fmt: skip
        return links

    def apply(self, logits: Logits) -> Logits:
        """Logits `(n_vocab,)` lowered for what was said; in the order of ids."""
        candidates = self._candidates
        candidates["id"], candidates["logit"] = self._ids, logits
        kind = dict(self._llama.llama_token_data_array._fields_)["data"]
        array = self._llama.llama_token_data_array(
            data=ctypes.cast(candidates.ctypes.data, kind), size=len(candidates), selected=-1,
            sorted=False,
        )  # fmt: skip
        self._llama.llama_sampler_apply(self._chain, ctypes.byref(array))
        changed: NDArray[np.float32] = candidates["logit"].copy()
        return changed

    def accept(self, token: int) -> None:
        """Take note of a token of the reply."""
        self._llama.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        """Free the chain."""
        self._llama.llama_sampler_free(self._chain)
