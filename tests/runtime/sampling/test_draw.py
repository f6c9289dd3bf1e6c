"""The draw keeps what llama.cpp's samplers keep, and follows the distribution."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorun.runtime.llama.binding import load_llama
from nanorun.runtime.sampling.draw import Noise, draw, likeliest, log_softmax_at, truncate


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


def at_step(step: int, seed: int = 1) -> Noise:
    noise = Noise(seed)
    noise.next_step(step)
    return noise


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_draws_follow_the_distribution(temperature: float, spread: float) -> None:
    n, n_draws = 300, 40_000
    logits = random_logits(5, n, spread)
    expected = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    expected *= n_draws / expected.sum()
    drawn = [draw(logits, None, temperature, at_step(step)) for step in range(n_draws)]
    counts = np.bincount(drawn, minlength=n)
    # Pearson's test over what is expected at least five times; the rest goes into one bin.
    often = expected >= 5
    observed = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum() + 1e-9)
    chi_square = ((observed - wanted) ** 2 / np.maximum(wanted, 1)).sum()
    n_free = often.sum()
    assert chi_square < n_free + 5 * np.sqrt(2 * n_free)


def test_what_is_very_unlikely_is_drawn_as_often_as_it_should_be() -> None:
    logits = np.full(500, -8.5, np.float32)  # together a tenth as likely as the first
    logits[7] = 0.0
    wanted = 499 * np.exp(-8.5)
    n_rare = sum(draw(logits, None, 1.0, at_step(step)) != 7 for step in range(5000))
    assert abs(n_rare - 5000 * wanted / (1 + wanted)) < 5 * np.sqrt(5000 * wanted)


def test_draws_hardly_depend_on_the_last_digits() -> None:
    logits = random_logits(9, 1000, spread=1.0)
    wobble = 1e-3 * random_logits(10, 1000, spread=1.0)
    pairs = [
        (draw(logits, None, 1.5, at_step(i)), draw(logits + wobble, None, 1.5, at_step(i)))
        for i in range(3000)
    ]
    assert sum(a != b for a, b in pairs) < 20


def test_draws_do_not_depend_on_what_else_is_considered() -> None:
    logits = random_logits(9, 1000, spread=1.0)
    some = np.arange(0, 1000, 3)
    drawn = {step: draw(logits, None, 1.0, at_step(step)) for step in range(300)}
    among_some = {step: whole for step, whole in drawn.items() if whole % 3 == 0}
    assert len(among_some) > 50
    for step, whole in among_some.items():
        assert some[draw(logits[some], some, 1.0, at_step(step))] == whole


@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 700),
    step=st.integers(0, 2**40),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_draw_never_takes_what_is_impossible(seed: int, n: int, step: int, spread: float) -> None:
    logits = random_logits(seed, n, spread)
    logits[1::2] = -np.inf
    i = draw(logits, None, 1.0, at_step(step, seed))
    assert 0 <= i < n and np.isfinite(logits[i])


def test_log_softmax_is_that_of_all_tokens() -> None:
    logits = random_logits(3, 2000)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    assert np.allclose(log_softmax_at(logits, np.arange(2000)), expected, atol=1e-6)
