"""The draw keeps what llama.cpp's samplers keep, and follows the distribution."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorun.runtime.draw import draw, likeliest, log_softmax_at, truncate
from nanorun.runtime.library import load_llama


def random_logits(seed: int, n: int, spread: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, n).astype(np.float32)


def kept_by_llama(logits: np.ndarray, *links: Any) -> set[int]:
    """Ids that a chain of llama.cpp's samplers leaves."""
    llama = load_llama()
    kind = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
    candidates = np.zeros(len(logits), kind)
    candidates["id"], candidates["logit"] = np.arange(len(logits)), logits
    pointer = dict(llama.llama_token_data_array._fields_)["data"]
    array = llama.llama_token_data_array(
        data=ctypes.cast(candidates.ctypes.data, pointer), size=len(logits), selected=-1,
        sorted=False,
    )  # fmt: skip
    for link in links:
        llama.llama_sampler_apply(link, ctypes.byref(array))
        llama.llama_sampler_free(link)
    return {array.data[i].id for i in range(array.size)}


@given(seed=st.integers(0, 2**32), n=st.integers(1, 3000), k=st.integers(1, 300))
def test_likeliest_are_the_highest_in_order(seed: int, n: int, k: int) -> None:
    logits = random_logits(seed, n)
    expected = np.argsort(-logits, kind="stable")[:k]
    assert likeliest(logits, k).tolist() == expected.tolist()


@pytest.mark.parametrize("n", [700, 5000, 40_000])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(40, 1.0, 0.0), (0, 0.95, 0.0), (0, 0.3, 0.0), (40, 0.9, 0.0), (0, 1.0, 0.05),
     (100, 0.95, 0.02)],
)  # fmt: skip
def test_filters_keep_what_llama_cpp_keeps(n: int, top_k: int, top_p: float, min_p: float) -> None:
    llama = load_llama()
    logits = random_logits(n + top_k, n)
    links = []
    if top_k:
        links.append(llama.llama_sampler_init_top_k(top_k))
    if top_p < 1:
        links.append(llama.llama_sampler_init_top_p(top_p, 1))
    if min_p:
        links.append(llama.llama_sampler_init_min_p(min_p, 1))
    ours = truncate(logits, top_k=top_k, top_p=top_p, min_p=min_p)
    assert ours is not None
    theirs = kept_by_llama(logits, *links)
    # Sums of thousands of probabilities round differently; few tokens may fall on either side.
    assert len(theirs ^ set(ours.tolist())) <= 1 + len(ours) // 1000


def test_no_filter_keeps_all() -> None:
    assert truncate(random_logits(1, 100), top_k=0, top_p=1.0, min_p=0.0) is None


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = random_logits(5, 1000, spread=1.0)
    expected = np.exp(logits.astype(np.float64) / temperature)
    expected /= expected.sum()
    us = (np.arange(20_000) + 0.5) / 20_000  # a fine comb instead of chance
    counts = np.bincount([draw(logits, temperature, float(u)) for u in us], minlength=1000)
    assert np.abs(counts / 20_000 - expected).max() < 2e-4


@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 700),
    u=st.floats(0, 1, exclude_max=True),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_draw_never_takes_what_is_impossible(seed: int, n: int, u: float, spread: float) -> None:
    logits = random_logits(seed, n, spread)
    logits[1::2] = -np.inf
    i = draw(logits, 1.0, u)
    assert 0 <= i < n and np.isfinite(logits[i])


def test_log_softmax_is_that_of_all_tokens() -> None:
    logits = random_logits(3, 2000)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    assert np.allclose(log_softmax_at(logits, np.arange(2000)), expected, atol=1e-6)
