from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nanorun.cli import calibration
from nanorun.model.arch import HybridArch
from nanorun.plan.machine.hardware import detect_hardware
from nanorun.plan.shape import shape_of_recipe
from tests.model.known_archs import NANO, NANO_4B, SUPER, TINY_DENSE, TINY_MOE, TINY_PUZZLE


@pytest.mark.parametrize("arch", [NANO, SUPER, NANO_4B, TINY_MOE, TINY_DENSE, TINY_PUZZLE])
def test_slice_is_a_model_of_the_same_widths(arch: HybridArch) -> None:
    sliced = calibration.slice_of(arch)
    sliced.validate()
    assert sliced.n_embd == arch.n_embd
    assert sliced.n_ff_exp == arch.n_ff_exp
    assert arch.pattern.startswith(sliced.pattern)
    assert set(sliced.layers) == set(arch.layers) or len(arch.layers) > len(sliced.layers)


@pytest.mark.parametrize("arch", [TINY_MOE, TINY_DENSE])
def test_measured_speed_is_kept_for_its_types(arch: HybridArch) -> None:
    machine = detect_hardware()
    shape = shape_of_recipe("tiny", replace(arch, n_ctx_train=4096), "q8_0")
    assert calibration.known_speed(shape, machine) is None
    found = calibration.measure_speed(shape, machine)
    assert found.decode_bandwidth > 0
    assert calibration.known_speed(shape, machine) == found
    other = shape_of_recipe("tiny", arch, "f16")
    assert calibration.known_speed(other, machine) is None


def test_damaged_cache_is_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    path.write_text("{")
    monkeypatch.setattr("nanorun.cli.benchmarks.cache_path", lambda: path)
    shape = shape_of_recipe("tiny", TINY_MOE, "q8_0")
    assert calibration.known_speed(shape, detect_hardware()) is None
