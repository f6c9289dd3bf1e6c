from __future__ import annotations

import pytest

from nanorun.model.engine_options import EngineOptions
from nanorun.plan.memory_plan import plan_model
from nanorun.plan.plan import Wish
from nanorun.plan.shape import ModelShape, shape_of_recipe
from nanorun.plan.speed_estimate import (
    Calibration,
    SpeedEstimate,
    decode_bytes,
    estimate_speed,
    prefill_flops_per_token,
)
from tests.model.known_archs import NANO, SUPER_TRUNK
from tests.plan.profiles import profile

K = 1024


def shape(recipe: str = "q4_0") -> ModelShape:
    return shape_of_recipe("nano", NANO, recipe)


# Published speeds (reference/nemotron.md, section 6); each must lie in the stated range.
@pytest.mark.parametrize(
    ("machine", "recipe", "n_past", "decode_tps"),
    [
        ("2x-rtx-3090", "q4_0", 0, 187),
        ("rtx-4090", "q4_0", 0, 196),
        ("rtx-4090", "iq4_nl", 256 * K, 98),
        ("rtx-5090", "q4_0", 0, 229),
    ],
)
def test_published_decode_speeds_are_in_range(
    machine: str, recipe: str, n_past: int, decode_tps: float
) -> None:
    settings = EngineOptions(n_parallel=1, n_ctx=512 * K)
    estimate = estimate_speed(shape(recipe), settings, profile(machine), n_past=n_past)
    low = estimate.decode_tps / (1 + estimate.uncertainty)
    high = estimate.decode_tps * (1 + estimate.uncertainty)
    assert low <= decode_tps <= high


def test_super_on_unified_memory_is_as_published() -> None:
    q4_k = shape_of_recipe("super", SUPER_TRUNK, "q4")
    estimate = estimate_speed(q4_k, EngineOptions(n_parallel=1, n_ctx=32 * K), profile("dgx-spark"))
    assert estimate.decode_tps == pytest.approx(19.9, rel=estimate.uncertainty)


def test_only_active_experts_are_read() -> None:
    n_bytes = decode_bytes(shape(), EngineOptions(n_parallel=1, n_ctx=8 * K))
    # 3.2 of 31.6 billion weights at 4.5 bits, and the states twice.
    assert 1.7e9 < n_bytes < 2.3e9
    assert n_bytes < shape().weights_bytes / 7


def test_full_context_is_slower() -> None:
    settings, machine = EngineOptions(n_parallel=1, n_ctx=1024 * K), profile("rtx-4090")
    empty = estimate_speed(shape(), settings, machine)
    full = estimate_speed(shape(), settings, machine, n_past=1024 * K)
    assert full.decode_tps < empty.decode_tps / 1.5


def test_experts_on_the_host_slow_down() -> None:
    machine = profile("rtx-4090")
    speeds = [
        estimate_speed(
            shape(), EngineOptions(n_parallel=1, n_ctx=8 * K, n_cpu_moe=n), machine
        ).decode_tps
        for n in (0, 10, 30, 52)
    ]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[-1] < speeds[0] / 2


def test_measurement_of_the_machine_decides() -> None:
    machine = profile("cpu-24g")
    calibration = Calibration(decode_bandwidth=30e9, prefill_flops=200e9)
    plan = plan_model([shape()], machine, Wish(n_ctx=8 * K), calibration)
    expected = 30e9 / decode_bytes(shape(), plan.options)
    assert plan.speed.decode_tps == pytest.approx(expected, rel=1e-6)
    assert plan.speed.prefill_tps == pytest.approx(200e9 / prefill_flops_per_token(NANO), rel=1e-6)
    assert plan.speed.uncertainty < estimate_speed(shape(), plan.options, machine).uncertainty


def test_estimate_is_shown_as_a_range() -> None:
    shown = SpeedEstimate(decode_tps=100.0, prefill_tps=5.0, uncertainty=0.25).render()
    assert shown == "decode 80 to 120 t/s, prefill 4.0 to 6.2 t/s"
