from __future__ import annotations

import pytest

from nanorun.library.bundled import BUNDLED_MODELS
from nanorun.library.catalog import CATALOG
from nanorun.model.arch import HybridArch
from tests.model.known_archs import LIGHTNING, NANO, NANO_4B, SUPER


@pytest.mark.parametrize(
    ("name", "arch"),
    [("nano", NANO), ("nano-4b", NANO_4B), ("lightning", LIGHTNING), ("super", SUPER)],
)
def test_known_shapes_are_those_of_the_released_models(name: str, arch: HybridArch) -> None:
    assert CATALOG[name].arch == arch


def test_every_model_says_where_it_comes_from() -> None:
    assert list(CATALOG)[:2] == ["pico", "pico-mtp"]
    for name, model in CATALOG.items():
        assert model.name == name
        assert (model.repository is None) == (name in BUNDLED_MODELS)
        assert model.summary
