"""Picking the next token: settled values, penalties, allowed tokens, and the draw."""

from __future__ import annotations

import ctypes
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanorun.errors import UsageError
from nanorun.model.chat import GenerateOptions
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

if TYPE_CHECKING:
    from nanorun.runtime.llama.context import Context

# llama.cpp's own defaults of the sampler that "don't repeat yourself" (common/common.h).
_DRY_BREAKERS = (b"\n", b":", b'"', b"*")
# DRY looks for sequences, so it looks further back than penalties for single tokens.
_MIN_DRY_TOKENS = 1024
# More tokens than a reply has; the samplers keep a ring of this size.
_WHOLE_REPLY = 2**18
_MIN_TEMPERATURE = 1e-5


MAX_LOGPROBS = 20
"""Most alternatives that may be asked for, as in OpenAI's endpoint."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """Settled values of one request. Temperature 0 is greedy; the filters then rest."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    """Tokens of the reply that the penalties look back on; -1 for all."""
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    n_logprobs: int | None = None
    """Alternatives whose log-probabilities are reported with each token; None for none at all."""

    @property
    def has_penalties(self) -> bool:
        """Whether what was said before changes the logits."""
        plain = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return plain != (1.0, 0.0, 0.0) or self.dry_multiplier > 0


def settle_sampling(
    options: GenerateOptions,
    *,
    thinking: bool,
    n_vocab: int,
    defaults: SamplingSettings | None = None,
) -> SamplingSettings:
    """Fill what a request leaves open with the model's defaults.

    Without defaults in the file, those of Nano's model card: temperature 1.0 and top-p 1.0 with
    thinking, 0.6 and 0.95 with tools, greedy without thinking.

    Raises:
        UsageError: If a value is out of its range.
    """
    if defaults is not None:
        family = defaults
    elif not thinking:
        family = SamplingSettings(temperature=0.0)
    elif options.tools:
        family = SamplingSettings(temperature=0.6, top_p=0.95)
    else:
        family = SamplingSettings(temperature=1.0)

    def pick(asked: float | None, default: float) -> float:
        return default if asked is None else asked

    temperature = pick(options.temperature, family.temperature)
    settings = SamplingSettings(
        # Logits divided by less leave the range of a float, and the likeliest wins anyway.
        temperature=0.0 if 0 < temperature < _MIN_TEMPERATURE else temperature,
        top_p=pick(options.top_p, family.top_p),
        top_k=int(pick(options.top_k, family.top_k)),
        min_p=pick(options.min_p, family.min_p),
        seed=options.seed,
        logit_bias=options.logit_bias,
        repetition_penalty=pick(options.repetition_penalty, family.repetition_penalty),
        frequency_penalty=pick(options.frequency_penalty, 0.0),
        presence_penalty=pick(options.presence_penalty, 0.0),
        penalty_last_n=int(pick(options.penalty_last_n, 64)),
        dry_multiplier=pick(options.dry_multiplier, 0.0),
        dry_base=pick(options.dry_base, 1.75),
        dry_allowed_length=int(pick(options.dry_allowed_length, 2)),
        n_logprobs=options.logprobs,
    )
    _check_range("temperature", settings.temperature, 0, 5)
    _check_range("top_p", settings.top_p, 0, 1)
    _check_range("top_k", settings.top_k, 0, 2**31 - 1)
    _check_range("min_p", settings.min_p, 0, 1)
    _check_range("repetition_penalty", settings.repetition_penalty, 0.01, 10)
    _check_range("frequency_penalty", settings.frequency_penalty, -2, 2)
    _check_range("presence_penalty", settings.presence_penalty, -2, 2)
    _check_range("penalty_last_n", settings.penalty_last_n, -1, 2**31 - 1)
    _check_range("dry_multiplier", settings.dry_multiplier, 0, 100)
    _check_range("dry_base", settings.dry_base, 1, 100)
    _check_range("dry_allowed_length", settings.dry_allowed_length, 1, 2**31 - 1)
    _check_range("logprobs", settings.n_logprobs or 0, 0, MAX_LOGPROBS)
    for token, _ in settings.logit_bias:
        _check_range("token of logit_bias", token, 0, n_vocab - 1)
    return settings


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} {value} is not between {low} and {high}")


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

    def sample(self, context: Context, index: int, allowed: Ids | None = None) -> Choice:
        """The next token.

        Args:
            context: Holds the logits.
            index: Output of the last decode.
            allowed: Ids that a grammar permits; None for all.
        """
        raw = context.logits(index)
        token = self._pick(self._adjusted(raw), allowed)
        self.accept(token)
        if self._settings.n_logprobs is None:
            return Choice(token)
        return _with_logprobs(token, raw, self._settings.n_logprobs)

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
