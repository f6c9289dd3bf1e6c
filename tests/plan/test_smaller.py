from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from nanorun.model.engine_options import EngineOptions
from nanorun.model.footprint import state_bytes
from nanorun.model.ggml_type import GgmlType
from nanorun.plan.memory_plan import plan_model
from nanorun.plan.plan import Plan, Wish
from nanorun.plan.shape import ModelShape, shape_of_recipe
from nanorun.plan.smaller import describe_change, smaller_plans
from tests.model.known_archs import NANO
from tests.plan.profiles import NAMES, profile

K = 1024


@cache
def q4_0() -> ModelShape:
    return shape_of_recipe("nano", NANO, "q4_0")


def plan(machine: str, n_ctx: int, n_parallel: int = 1, leave: int | None = None) -> Plan:
    wish = Wish(n_ctx=n_ctx, fixed=EngineOptions(n_parallel=n_parallel))
    return plan_model([q4_0()], profile(machine).restricted(leave=leave), wish)


def scarce(plan: Plan) -> int:
    """Bytes of what runs out first: the accelerators', or all of main memory."""
    gpus = [use for use in plan.uses if use.name != "CPU"]
    return sum(u.total_bytes for u in (gpus if plan.hardware.accelerators else plan.uses))


@pytest.mark.parametrize("machine", NAMES)
@pytest.mark.parametrize(("n_ctx", "n_parallel"), [(8 * K, 1), (128 * K, 4), (1024 * K, 1)])
def test_each_is_smaller_than_the_one_before(machine: str, n_ctx: int, n_parallel: int) -> None:
    first = plan(machine, n_ctx, n_parallel)
    found = smaller_plans(first)
    assert len(found) >= 3
    for before, smaller in zip([first, *(s.plan for s in found)], found, strict=False):
        old, new = before.options, smaller.plan.options
        assert scarce(smaller.plan) < scarce(before)
        assert smaller.change
        assert new.n_ctx <= old.n_ctx and new.n_parallel <= old.n_parallel
        assert new.n_ubatch <= old.n_ubatch and new.n_seq_spare <= old.n_seq_spare
        assert new.checkpoint_bytes + new.archive_bytes <= old.checkpoint_bytes + old.archive_bytes
        assert new.checkpoint_bytes >= 2 * state_bytes(NANO) - 1


@pytest.mark.parametrize("machine", NAMES)
def test_each_fits_the_machine(machine: str) -> None:
    found = smaller_plans(plan(machine, 128 * K))
    assert found
    for smaller in found:
        made = replace(smaller.plan, hardware=profile(machine))
        assert all(use.spare_bytes >= 0 for use in made.uses)


def test_context_goes_before_requests_do_and_precision_before_both() -> None:
    changes = [smaller.change for smaller in smaller_plans(plan("cpu-24g", 128 * K, 4, 2**29))]
    assert [change.split(" ->")[0] for change in changes] == [
        "room for saved prompts 1.5 GiB",
        "KV cache f16",
        "KV cache q8_0",
        "n_ctx 131,072",
    ]
    assert changes[-1].startswith("n_ctx 131,072 -> 32,768, requests at a time 4 -> 2")


def test_experts_leave_the_accelerator_before_context_is_cut() -> None:
    found = smaller_plans(plan("rtx-4060-ti-16g", 128 * K))
    assert found[0].change.startswith("blocks with experts in main memory")
    assert {smaller.plan.options.n_ctx for smaller in found} == {128 * K}
    assert found[-1].plan.uses[0].total_bytes < 8 * 2**30


def test_change_is_told_in_the_order_in_which_it_is_noticed() -> None:
    before = EngineOptions(n_ctx=128 * K, n_parallel=4)
    after = replace(
        before, n_ctx=64 * K, type_k=GgmlType.Q8_0, type_v=GgmlType.Q8_0, n_gpu_layers=20,
        n_ubatch=128, checkpoint_bytes=2**28, archive_bytes=0,
    )  # fmt: skip
    assert describe_change(before, after) == (
        "n_ctx 131,072 -> 65,536, KV cache f16 -> q8_0, layers on the accelerator all -> 20,"
        " n_ubatch 512 -> 128, room for saved prompts 3.0 GiB -> 256.0 MiB"
    )
    assert describe_change(before, before) == ""
