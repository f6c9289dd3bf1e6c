"""Picking the next token: penalties, allowed tokens, and the draw."""

from __future__ import annotations

import ctypes
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanorun.runtime.llama.binding import load_llama
from nanorun.runtime.sampling.draw import (
    Ids,
    Logits,
    Noise,
    draw,
    likeliest,
    log_softmax_at,
    truncate,
)
from nanorun.runtime.sampling.settings import SamplingSettings

# llama.cpp's own defaults of the sampler that "don't repeat yourself" (common/common.h).
_DRY_BREAKERS = (b"\n", b":", b'"', b"*")
# DRY looks for sequences, so it looks further back than penalties for single tokens.
_MIN_DRY_TOKENS = 1024
# More tokens than a reply has; the samplers keep a ring of this size.
_WHOLE_REPLY = 2**18


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, and what the model thought of it."""

    token: int
    logprob: float | None = None
    """Natural logarithm of its probability, before temperature and filters; None if not asked."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, likeliest first."""


class Sampler:
    """Picks tokens for one reply; its random numbers depend on its seed alone.

    Args:
        settings: The request's values.
        n_vocab: Tokens of the vocabulary.
        vocab: llama.cpp's vocabulary; only the DRY penalty needs it.
    """

    def __init__(self, settings: SamplingSettings, n_vocab: int, vocab: Any = None) -> None:
        self._settings = settings
        self._n_vocab = n_vocab
        self._penalties = _Penalties(settings, n_vocab, vocab) if settings.has_penalties else None
        self._noise = Noise(secrets.randbits(64) if settings.seed is None else settings.seed)
        self._n_drawn = 0

    def sample(self, logits: Logits, allowed: Ids | None = None) -> Choice:
        """The next token.

        Args:
            logits: One row of the model's output, `(n_vocab,)`; not changed.
            allowed: Ids that may come next; None for all.
        """
        token = self._pick(self._adjusted(logits), allowed)
        self.accept(token)
        if self._settings.logprobs is None:
            return Choice(token)
        return _with_logprobs(token, logits, self._settings.logprobs)

    def accept(self, token: int) -> None:
        """Take note of a token of the reply that was forced and not sampled."""
        if self._penalties is not None:
            self._penalties.accept(token)

    def close(self) -> None:
        """Free what llama.cpp holds."""
        if self._penalties is not None:
            self._penalties.close()
            self._penalties = None

    def _adjusted(self, logits: Logits) -> Logits:
        """The logits with bias and penalties."""
        if self._settings.logit_bias:
            logits = logits.copy()
            for token, bias in self._settings.logit_bias:
                logits[token] += bias
        return logits if self._penalties is None else self._penalties.apply(logits)

    def _pick(self, logits: Logits, allowed: Ids | None) -> int:
        s = self._settings
        if allowed is not None:
            logits = logits[allowed]
        if s.temperature == 0:
            i = int(logits.argmax())
        else:
            kept = truncate(logits, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p)
            i = self._draw(logits, kept, allowed)
        return i if allowed is None else int(allowed[i])

    def _draw(self, logits: Logits, kept: Ids | None, allowed: Ids | None) -> int:
        """Place in `logits` of a token drawn from those that are kept."""
        self._noise.next_step(self._n_drawn)
        self._n_drawn += 1
        temperature = self._settings.temperature
        if kept is None:
            return draw(logits, allowed, temperature, self._noise)
        ids = kept if allowed is None else allowed[kept]
        return int(kept[draw(logits[kept], ids, temperature, self._noise)])


def _with_logprobs(token: int, logits: Logits, n_alternatives: int) -> Choice:
    best = likeliest(logits, n_alternatives) if n_alternatives else np.empty(0, np.intp)
    logprobs = log_softmax_at(logits, np.append(best, token))
    alternatives = tuple(zip(best.tolist(), logprobs[:-1].tolist(), strict=True))
    return Choice(token, float(logprobs[-1]), alternatives)


class _Penalties:
    """llama.cpp's penalty samplers, fed with the tokens of the reply."""

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
        self._llama.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        self._llama.llama_sampler_free(self._chain)


# llama_token_data of llama.h
_CANDIDATE = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
