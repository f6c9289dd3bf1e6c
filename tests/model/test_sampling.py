from __future__ import annotations

from dataclasses import fields, replace

import pytest

from nanorun.errors import UsageError
from nanorun.model.sampling import SamplingFields, check_sampling

RANGED = [f.name for f in fields(SamplingFields) if "range" in f.metadata]


def test_every_number_but_the_seed_has_a_range() -> None:
    assert {f.name for f in fields(SamplingFields)} - set(RANGED) == {"seed", "logit_bias"}


@pytest.mark.parametrize("name", RANGED)
def test_values_out_of_their_range_are_refused_by_name(name: str) -> None:
    (low, high) = next(f.metadata["range"] for f in fields(SamplingFields) if f.name == name)
    for value in (low, high):
        check_sampling(replace(SamplingFields(), **{name: value}))
    for value in (low - 1, high + 1, float("nan")):
        with pytest.raises(UsageError, match=name):
            check_sampling(replace(SamplingFields(), **{name: value}))
