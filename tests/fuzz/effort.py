"""How long a target is fuzzed: a few examples every time, thousands by `make test-slow`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

T = TypeVar("T")


def efforts(few: int, many: int) -> pytest.MarkDecorator:
    """Gives a test `n_examples`, once for every run and once for the slow ones."""
    slow = pytest.param(many, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
    return pytest.mark.parametrize("n_examples", [few, slow], ids=["few", "many"])


def fuzz(check: Callable[[T], None], examples: SearchStrategy[T], n_examples: int) -> None:
    """Check examples; the few are always the same ones, the many are new each time."""
    run = settings(
        max_examples=n_examples,
        derandomize=n_examples < 1000,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )(given(examples)(check))
    run()
