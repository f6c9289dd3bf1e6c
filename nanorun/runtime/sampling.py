"""Picking the next token: llama.cpp's sampler chain, or plain argmax where that suffices."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nanorun.errors import UsageError
from nanorun.model.chat import GenerateOptions
from nanorun.runtime.library import load_llama

if TYPE_CHECKING:
    from nanorun.runtime.context import Context


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """Settled values of one request. Temperature 0 is greedy; the other fields then rest."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()


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

    settings = SamplingSettings(
        temperature=pick(options.temperature, family.temperature),
        top_p=pick(options.top_p, family.top_p),
        top_k=int(pick(options.top_k, family.top_k)),
        min_p=pick(options.min_p, family.min_p),
        seed=options.seed,
        logit_bias=options.logit_bias,
    )
    _check_range("temperature", settings.temperature, 0, 5)
    _check_range("top_p", settings.top_p, 0, 1)
    _check_range("top_k", settings.top_k, 0, 2**31 - 1)
    _check_range("min_p", settings.min_p, 0, 1)
    for token, _ in settings.logit_bias:
        _check_range("token of logit_bias", token, 0, n_vocab - 1)
    return settings


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} {value} is not between {low} and {high}")


class Sampler:
    """Picks tokens for one reply; its random numbers depend on its seed alone."""

    def __init__(self, settings: SamplingSettings, n_vocab: int) -> None:
        self._llama = load_llama()
        self._n_vocab = n_vocab
        self._bias = dict(settings.logit_bias)
        self._chain = None if settings.temperature == 0 else self._build(settings)

    def _build(self, settings: SamplingSettings) -> object:
        llama = self._llama
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        links = []
        if settings.logit_bias:
            kind = llama.llama_logit_bias * len(settings.logit_bias)
            biases = kind(*(llama.llama_logit_bias(t, b) for t, b in settings.logit_bias))
            links.append(llama.llama_sampler_init_logit_bias(self._n_vocab, len(biases), biases))
        if settings.top_k:
            links.append(llama.llama_sampler_init_top_k(settings.top_k))
        if settings.top_p < 1:
            links.append(llama.llama_sampler_init_top_p(settings.top_p, 1))
        if settings.min_p:
            links.append(llama.llama_sampler_init_min_p(settings.min_p, 1))
        links.append(llama.llama_sampler_init_temp(settings.temperature))
        seed = secrets.randbits(32) if settings.seed is None else settings.seed % 2**32
        links.append(llama.llama_sampler_init_dist(seed))
        for link in links:
            llama.llama_sampler_chain_add(chain, link)
        return chain

    def sample(self, context: Context, index: int) -> int:
        """The next token, from the logits at `index` of the last decode."""
        if self._chain is None:
            return self._greedy(context.logits(index))
        return int(self._llama.llama_sampler_sample(self._chain, context.handle, index))

    def _greedy(self, logits: NDArray[np.float32]) -> int:
        if self._bias:
            logits = logits.copy()
            for token, bias in self._bias.items():
                logits[token] += bias
        return int(logits.argmax())

    def close(self) -> None:
        """Free the chain."""
        if self._chain is not None:
            self._llama.llama_sampler_free(self._chain)
            self._chain = None
