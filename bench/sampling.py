"""What picking a token costs at a vocabulary of 131,072, against llama.cpp's sampler chain.

    python bench/sampling.py

Logits are random with a few hundred likely tokens, as a model's are. Both take turns; the figures
are medians in microseconds.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from nanorun.runtime.llama.binding import load_llama
from nanorun.runtime.llama.penalties import build_penalties
from nanorun.runtime.sampling.sampler import Sampler
from nanorun.runtime.sampling.settings import SamplingSettings

N_VOCAB, N_ROUNDS = 131_072, 200
CASES = {
    "greedy": SamplingSettings(0.0),
    "temperature 1.0 (Nano, thinking)": SamplingSettings(1.0, seed=1),
    "0.6, top-p 0.95 (Nano, tools)": SamplingSettings(0.6, top_p=0.95, seed=1),
    "1.0, top-p 0.95 (Super)": SamplingSettings(1.0, top_p=0.95, seed=1),
    "top-k 40, top-p 0.95": SamplingSettings(0.8, top_p=0.95, top_k=40, seed=1),
    "min-p 0.05": SamplingSettings(1.0, min_p=0.05, seed=1),
}


def made_up_logits() -> np.ndarray:
    """Logits `(N_VOCAB,)` with a few hundred likely tokens."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 2, N_VOCAB).astype(np.float32)
    values[rng.choice(N_VOCAB, 300)] += 8
    return values


class Chain:
    """llama.cpp's chain on the same logits, as `llama_sampler_sample` runs it."""

    def __init__(self, settings: SamplingSettings) -> None:
        self._llama = llama = load_llama()
        self._chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        for link in self._links(settings):
            llama.llama_sampler_chain_add(self._chain, link)
        self._data = np.zeros(N_VOCAB, [("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
        self._ids = np.arange(N_VOCAB, dtype=np.int32)

    def _links(self, s: SamplingSettings) -> list[Any]:
        llama = self._llama
        if s.temperature == 0:
            return [llama.llama_sampler_init_greedy()]
        links = []
        if s.top_k:
            links.append(llama.llama_sampler_init_top_k(s.top_k))
        if s.top_p < 1:
            links.append(llama.llama_sampler_init_top_p(s.top_p, 1))
        if s.min_p:
            links.append(llama.llama_sampler_init_min_p(s.min_p, 1))
        return [*links, llama.llama_sampler_init_temp(s.temperature),
                llama.llama_sampler_init_dist(1)]  # fmt: skip

    def sample(self, logits: np.ndarray) -> None:
        """Pick one token."""
        self._data["id"], self._data["logit"] = self._ids, logits
        kind = dict(self._llama.llama_token_data_array._fields_)["data"]
        array = self._llama.llama_token_data_array(
            data=ctypes.cast(self._data.ctypes.data, kind), size=N_VOCAB, selected=-1, sorted=False
        )
        self._llama.llama_sampler_apply(self._chain, ctypes.byref(array))


def timed(act: Callable[[], object]) -> float:
    """Microseconds of one call."""
    started = time.perf_counter()
    act()
    return (time.perf_counter() - started) * 1e6


def main() -> None:
    """Print a row a case."""
    logits = made_up_logits()
    print("| settings | nanorun µs | llama.cpp's chain µs | ratio |")
    print("|---|---|---|---|")
    for name, settings in CASES.items():
        ours = Sampler(settings, build_penalties(settings, N_VOCAB))
        theirs = Chain(settings)
        pairs = [
            (
                timed(lambda: ours.sample(logits)),  # noqa: B023
                timed(lambda: theirs.sample(logits)),  # noqa: B023
            )
            for _ in range(N_ROUNDS)
        ]
        a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"| {name} | {a:.0f} | {b:.0f} | {a / b:.2f} |", flush=True)


if __name__ == "__main__":
    main()
