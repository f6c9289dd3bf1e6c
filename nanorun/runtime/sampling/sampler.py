"""Picking the next token: penalties, allowed tokens, and the draw."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Protocol

import numpy as np

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


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, and what the model thought of it."""

    token: int
    logprob: float | None = None
    """Natural logarithm of its probability, before temperature and filters; None if not asked."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, likeliest first."""


class Penalties(Protocol):
    """Lowers the logits of tokens for what the reply has said."""

    def apply(self, logits: Logits) -> Logits:
        """Logits `(n_vocab,)` in the order of ids, lowered; the given ones stay as they are."""

    def accept(self, token: int) -> None:
        """Take note of a token of the reply."""

    def close(self) -> None:
        """Free what it holds."""


class Sampler:
    """Picks tokens for one reply; its random numbers depend on its seed alone.

    Args:
        settings: The request's values.
        penalties: What lowers logits for what was said; closed with the sampler.

    Raises:
        ValueError: If the settings ask for penalties and none are given.
    """

    def __init__(self, settings: SamplingSettings, penalties: Penalties | None = None) -> None:
        if settings.has_penalties and penalties is None:
            raise ValueError("settings with penalties need something that applies them")
        self._settings = settings
        self._penalties = penalties
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
        """Free what the penalties hold."""
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
