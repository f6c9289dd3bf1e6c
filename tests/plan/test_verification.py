from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nanorun.model.measurement import Measurement
from nanorun.plan.memory_plan import plan_model
from nanorun.plan.plan import Plan, Wish
from nanorun.plan.shape import shape_of_recipe
from nanorun.plan.verification import Verification, render_verification, verification_keys
from tests.model.known_archs import NANO
from tests.plan.profiles import profile

K, MIB = 1024, 2**20


def plan_on(machine: str, n_ctx: int = 8 * K) -> Plan:
    return plan_model([shape_of_recipe("nano", NANO, "q4_0")], profile(machine), Wish(n_ctx=n_ctx))


def as_planned(plan: Plan, **changes: Any) -> Measurement:
    """A load that took exactly what was planned, under the engine's names of buffers."""
    names = {"CPU": "CPU_REPACK"}
    parts = {
        part: {names.get(use.name, use.name): getattr(use, f"{part}_bytes") for use in plan.uses}
        for part in ("weights", "kv", "state", "compute", "output")
    }
    host = next((use for use in plan.uses if use.name == "CPU"), None)
    peak = host.total_bytes - host.checkpoint_bytes if host else 300 * MIB
    measured = Measurement(
        **parts,
        gpu_bytes={use.name: use.total_bytes for use in plan.uses if use.name != "CPU"},
        base_bytes=50 * MIB, resident_bytes=peak, proportional_bytes=None, peak_bytes=peak,
        load_s=1.0, prefill_tps=100.0, decode_tps=10.0,
    )  # fmt: skip
    return replace(measured, **changes)


def verified(plan: Plan, measured: Measurement) -> Verification:
    return Verification(plan=plan, probed={}, measured=measured, n_fill=plan.options.n_ctx)


@pytest.mark.parametrize("machine", ["cpu-24g", "rtx-4090", "2x-rtx-3090", "rtx-3060-12g"])
def test_load_that_takes_what_was_planned_has_no_error(machine: str) -> None:
    plan = plan_on(machine)
    found = verified(plan, as_planned(plan))
    assert found.max_error == 0
    for planned, measured in zip(plan.uses, found.devices, strict=True):
        assert measured == replace(planned, checkpoint_bytes=0)


def test_each_gpu_has_a_row_where_the_driver_tells() -> None:
    plan = plan_on("2x-rtx-3090")
    found = verified(plan, as_planned(plan))
    assert [row.part for row in found.rows][-3:] == ["CUDA0 total", "CUDA1 total", "CPU total"]
    silent = verified(plan, as_planned(plan, gpu_bytes={}))
    assert [row.part for row in silent.rows][-2:] == ["output", "CPU total"]


def test_main_memory_that_a_gpu_shares_holds_both() -> None:
    plan = plan_on("dgx-spark")
    total = plan.uses[0].total_bytes - plan.uses[0].checkpoint_bytes
    found = verified(plan, as_planned(plan, gpu_bytes={"CUDA0": total - 300 * MIB}))
    assert [row.part for row in found.rows][-1] == "CUDA0 total"
    assert found.max_error == 0


def test_largest_error_is_told() -> None:
    plan = plan_on("cpu-24g")
    exact = as_planned(plan)
    (buffer,) = exact.kv
    found = verified(plan, replace(exact, kv={buffer: exact.kv[buffer] * 5 // 4}))
    assert found.max_error == pytest.approx(0.2, abs=0.001)
    keys = verification_keys(found)
    assert keys["max_error"] == found.max_error
    assert keys["measured"][0]["kv_bytes"] == exact.kv[buffer] * 5 // 4
    assert keys["comparison"][1]["error"] == found.max_error
    assert "kv " in render_verification(found) and "19.9" in render_verification(found)


def test_mask_is_counted_as_far_as_the_context_is_used() -> None:
    plan = plan_on("cpu-24g", 256 * K)
    untouched = (256 * K - 512) * plan.options.n_ubatch * 2
    exact = as_planned(plan)
    short = replace(exact, peak_bytes=exact.peak_bytes - untouched)
    found = Verification(plan=plan, probed={}, measured=short, n_fill=512)
    assert found.max_error < 0.001
