"""The search for the best types within a budget."""

from __future__ import annotations

import itertools
import random

import pytest

from nanorun.model.ggml_type import GgmlType as T
from nanorun_quant.search import Candidate, Item, allocate

TYPES = (T.Q2_0, T.Q3_K, T.Q4_K, T.Q5_K, T.Q8_0)


def random_items(seed: int, n: int) -> list[Item]:
    rng = random.Random(seed)
    items = []
    for i in range(n):
        size, loss = rng.randint(5, 200), rng.uniform(0.1, 10)
        candidates = tuple(
            Candidate(t, int(size * t.bpw), loss * 4**-t.bpw * rng.uniform(0.7, 1.4)) for t in TYPES
        )
        items.append(Item(str(i), candidates))
    return items


def cost(chosen: list[Candidate]) -> tuple[float, int]:
    return sum(c.error for c in chosen), sum(c.n_bytes for c in chosen)


@pytest.mark.parametrize("seed", range(20))
def test_result_is_within_the_budget_and_near_the_best(seed: int) -> None:
    items = random_items(seed, 6)
    budget = sum(item.candidates[0].n_bytes for item in items) * 2
    chosen = allocate(items, budget)
    assert chosen is not None
    everything = itertools.product(*(item.candidates for item in items))
    best = min(cost(list(c))[0] for c in everything if cost(list(c))[1] <= budget)
    error, n_bytes = cost(chosen)
    assert n_bytes <= budget
    # Few tensors leave a gap that no single change fills; many leave none that matters.
    assert error <= 1.5 * best


def test_no_single_change_improves_the_result() -> None:
    items = random_items(99, 40)
    budget = sum(item.candidates[0].n_bytes for item in items) * 2
    chosen = allocate(items, budget)
    assert chosen is not None
    rest = budget - cost(chosen)[1]
    for item, now in zip(items, chosen, strict=True):
        for candidate in item.candidates:
            fits = candidate.n_bytes - now.n_bytes <= rest
            assert not (fits and candidate.error < now.error)


def test_more_bytes_never_cost_error_and_the_same_budget_gives_the_same() -> None:
    items = random_items(5, 30)
    least = sum(item.candidates[0].n_bytes for item in items)
    errors = []
    for factor in (1.0, 1.3, 1.7, 2.2, 3.0, 5.0):
        chosen = allocate(items, int(least * factor))
        assert chosen is not None
        assert chosen == allocate(items, int(least * factor))
        errors.append(cost(chosen)[0])
    assert errors == sorted(errors, reverse=True)


def test_budget_below_the_smallest_is_no_budget() -> None:
    items = random_items(1, 4)
    least = sum(min(c.n_bytes for c in item.candidates) for item in items)
    assert allocate(items, least - 1) is None
    assert allocate(items, least) is not None


def test_type_that_costs_more_and_loses_more_is_never_taken() -> None:
    good, bad = Candidate(T.Q4_K, 100, 1.0), Candidate(T.Q5_0, 110, 1.1)
    assert allocate([Item("a", (good, bad))], 500) == [good]
