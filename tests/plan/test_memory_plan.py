from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from nanorun.errors import MemoryPlanError, UsageError
from nanorun.library import CATALOG
from nanorun.model.engine_options import EngineOptions
from nanorun.model.footprint import state_bytes
from nanorun.model.ggml_type import GgmlType
from nanorun.model.units import format_gib, parse_size
from nanorun.plan.explain import decisions
from nanorun.plan.memory_plan import longest_n_ctx, plan_model
from nanorun.plan.memory_use import device_uses
from nanorun.plan.plan import Plan, Wish
from nanorun.plan.report import plan_keys, render_plan
from nanorun.plan.shape import ModelShape, shape_of_recipe, shapes_of_recipes
from tests.model.known_archs import LIGHTNING, NANO
from tests.plan.profiles import NAMES, profile

GIB, MIB = 2**30, 2**20
GOLDEN = Path(__file__).parents[1] / "golden" / "plan"
K = 1024
TWO = EngineOptions(n_parallel=2)


@cache
def shapes(name: str = "nano") -> tuple[ModelShape, ...]:
    known = CATALOG[name]
    assert known.arch is not None
    return tuple(shapes_of_recipes(name, known.arch, known.repository))


@cache
def q4_0() -> ModelShape:
    return shape_of_recipe("nano", NANO, "q4_0")


def plan(machine: str, n_ctx: int | None, **wish: Any) -> Plan:
    return plan_model(shapes(), profile(machine), Wish(n_ctx=n_ctx, **wish))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_ctx", [32 * K, 256 * K, 1024 * K])
def test_plans_are_the_reviewed_ones(name: str, n_ctx: int) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())[str(n_ctx)]
    keys = plan_keys(plan(name, n_ctx))
    decided = {key: keys[key] for key in golden if key in keys}
    assert decided == {key: value for key, value in golden.items() if key in keys}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_ctx", [4 * K, 32 * K, 256 * K, 1024 * K, None])
def test_plans_keep_to_the_memory_there_is(name: str, n_ctx: int | None) -> None:
    made = plan(name, n_ctx)
    for use in made.uses:
        assert use.total_bytes + use.margin_bytes <= use.free_bytes
    assert made.options.n_ctx >= (n_ctx or 32 * K)
    assert made.speed.decode_tps > 1


# What people report (reference/nemotron.md, sections 2.3 and 6): cards that hold the model do.
@pytest.mark.parametrize(
    ("machine", "recipe", "n_ctx"),
    [
        ("rtx-4090", "q4_0", 256 * K),
        ("rtx-4090", "iq4_nl", 762 * K),
        ("2x-rtx-3090", "q4_0", 1024 * K),
        ("rtx-5090", "q4_0", 1024 * K),
    ],
)
def test_four_bits_stay_on_the_card(machine: str, recipe: str, n_ctx: int) -> None:
    shape = shape_of_recipe("nano", NANO, recipe)
    made = plan_model([shape], profile(machine), Wish(n_ctx=n_ctx))
    assert (made.options.n_gpu_layers, made.options.n_cpu_moe) == (-1, 0)


def test_recipes_for_a_number_format_are_taken_only_when_asked_for() -> None:
    # NVFP4 lies between two recipes: with this much memory it would be the largest that fits.
    machine = profile("rtx-4090").restricted(vram=19 * GIB)
    assert plan_model(shapes(), machine, Wish(n_ctx=32 * K)).shape.recipe == "q4"
    assert not {shape.recipe for shape in shapes()} & {"spark", "nvfp4_moe", "mxfp4_moe"}


def test_recipe_that_does_not_fit_comes_with_the_choice_of_another() -> None:
    asked = shape_of_recipe("nano:q8", NANO, "q8", "nvidia/nano")
    machine = profile("cpu-24g")
    with pytest.raises(MemoryPlanError) as caught:
        plan_model([asked], machine, Wish(n_ctx=32 * K))
    assert "nanorun plan nvidia/nano --n-ctx 32768" in caught.value.tries
    with pytest.raises(MemoryPlanError) as caught:
        plan_model(shapes(), machine.restricted(ram=GIB), Wish(n_ctx=32 * K))
    assert not any("--n-ctx" in command for command in caught.value.tries)


def test_experts_go_to_the_host_before_layers_do() -> None:
    made = plan_model([q4_0()], profile("rtx-3060-12g"), Wish(n_ctx=32 * K))
    assert made.options.n_gpu_layers == -1
    assert 0 < made.options.n_cpu_moe < 52
    # One layer of experts fewer on the host does not fit: the last counted block has experts.
    assert NANO.layers[made.options.n_cpu_moe - 1] == "E"


def test_layers_go_to_the_host_once_all_experts_did() -> None:
    machine = profile("rtx-3060-12g").restricted(vram=2 * GIB)
    made = plan_model([q4_0()], machine, Wish(n_ctx=32 * K))
    assert made.options.n_cpu_moe == 52
    assert 0 < made.options.n_gpu_layers < 53


def test_small_context_costs_no_comfort() -> None:
    made = plan("rtx-4090", 8 * K, type_kv=None)
    assert made.options.type_k is GgmlType.F16
    assert made.options.n_ubatch == 512


def test_max_is_the_longest_context_that_fits() -> None:
    machine = replace(profile("cpu-24g"))
    machine = machine.restricted(ram=20 * GIB)
    made = plan_model([q4_0()], machine, Wish(n_ctx=None, type_kv=GgmlType.Q8_0))
    longest = made.options.n_ctx
    assert 256 * K < longest < 1024 * K
    plan_model([q4_0()], machine, Wish(n_ctx=longest))
    with pytest.raises(MemoryPlanError):
        plan_model([q4_0()], machine, Wish(n_ctx=longest + 256, type_kv=GgmlType.Q8_0))


def test_unified_memory_is_counted_once() -> None:
    (use,) = plan("dgx-spark", 256 * K).uses
    assert use.name == "CUDA0"
    assert use.weights_bytes == plan("dgx-spark", 256 * K).shape.weights_bytes
    assert use.free_bytes == profile("dgx-spark").host.available_bytes


def test_quantized_kv_is_never_4_bits_on_unified_memory() -> None:
    types = set()
    for gib in range(22, 34):
        machine = profile("dgx-spark").restricted(vram=gib * GIB, ram=gib * GIB)
        try:
            types.add(plan_model([q4_0()], machine, Wish(n_ctx=1024 * K)).options.type_k)
        except MemoryPlanError:
            continue
    assert types == {GgmlType.F16, GgmlType.Q8_0}


def test_weights_are_placed_once() -> None:
    shape = q4_0()
    for settings in (
        EngineOptions(n_parallel=1, n_ctx=8 * K),
        EngineOptions(n_parallel=1, n_ctx=8 * K, n_cpu_moe=20),
        EngineOptions(n_parallel=1, n_ctx=8 * K, n_gpu_layers=30),
        EngineOptions(n_parallel=1, n_ctx=8 * K, n_gpu_layers=0),
    ):
        uses = device_uses(shape, settings, profile("2x-rtx-3090"))
        assert sum(use.weights_bytes for use in uses) == shape.weights_bytes
        kv = sum(use.kv_bytes for use in uses)
        assert abs(kv - 8 * K * 6144) <= len(uses)


def test_head_for_drafting_is_not_loaded_unasked() -> None:
    lightning = shape_of_recipe("lightning", LIGHTNING, "q4_0")
    machine = profile("cpu-24g")
    (without,) = device_uses(lightning, EngineOptions(n_parallel=1, n_ctx=8 * K), machine)
    (with_mtp,) = device_uses(
        lightning, EngineOptions(n_parallel=1, n_ctx=8 * K, speculation="mtp", n_draft=0), machine
    )
    assert without.weights_bytes == q4_0().weights_bytes
    assert with_mtp.weights_bytes == lightning.weights_bytes
    assert with_mtp.kv_bytes - without.kv_bytes == 8 * K * 1024


def test_two_states_at_least_are_kept_on_the_host() -> None:
    made = plan("cpu-24g", 1024 * K)
    assert made.options.checkpoint_bytes >= 2 * state_bytes(NANO)


def test_every_decision_has_its_line() -> None:
    made = plan("rtx-3060-12g", 256 * K)
    starts = [line.partition(" ")[0].rstrip(":") for line in decisions(made)]
    assert starts[:7] == ["recipe", "placement", "n_ctx", "KV", "n_ubatch", "n_seq_max",
                          "checkpoints"]  # fmt: skip
    text = render_plan(made)
    assert "nano (" in text and "CUDA0 " in text and "KV cache" in text


def test_time_to_load_is_told_where_the_disk_is_known() -> None:
    machine = replace(profile("cpu-24g"), disk_bandwidth=2e9)
    made = plan_model([q4_0()], machine, Wish(n_ctx=8 * K))
    assert "loading: about 9 s from a disk that reads 2.0 GB/s" in decisions(made)
    assert not any("loading" in line for line in decisions(plan("cpu-24g", 8 * K)))


@pytest.mark.parametrize("n_ctx", [0, -1, 1024 * K + 1, 2 * 1024 * K])
def test_context_that_the_model_never_saw_is_refused(n_ctx: int) -> None:
    with pytest.raises(UsageError, match="outside what nano was trained for"):
        plan("rtx-4090", n_ctx)


def test_requests_at_a_time_share_a_longer_context() -> None:
    made = plan_model([q4_0()], profile("dgx-spark"), Wish(n_ctx=2048 * K, fixed=TWO))
    assert made.options.n_ctx == 2048 * K
    with pytest.raises(UsageError, match="1 to 1,048,576 for each of 2 requests"):
        plan_model([q4_0()], profile("dgx-spark"), Wish(n_ctx=2049 * K, fixed=TWO))


@pytest.mark.parametrize("n_parallel", [0, -3, 257])
def test_more_sequences_than_the_engine_keeps_are_refused(n_parallel: int) -> None:
    with pytest.raises(UsageError, match="the engine keeps 1 to 256 apart"):
        plan("rtx-4090", 8 * K, fixed=EngineOptions(n_parallel=n_parallel))


def test_states_of_many_requests_are_counted() -> None:
    with pytest.raises(MemoryPlanError):
        plan_model(
            [q4_0()], profile("cpu-24g"), Wish(n_ctx=8 * K, fixed=EngineOptions(n_parallel=200))
        )


def test_plan_that_does_not_exist_says_what_would_help() -> None:
    machine = profile("cpu-24g").restricted(ram=19 * GIB)
    wish = Wish(n_ctx=1024 * K, type_kv=GgmlType.F16)
    with pytest.raises(MemoryPlanError) as caught:
        plan_model([replace(q4_0(), repository="nvidia/Nano")], machine, wish)
    longest = longest_n_ctx(q4_0(), machine, wish)
    assert longest is not None
    error = caught.value
    assert error.message.startswith("nano at n_ctx 1,048,576 needs 2")
    assert "but CPU has 19.0 GiB free" in error.message
    assert f"nanorun plan nano --n-ctx {longest}" in error.tries
    # Smaller numbers in the KV cache are offered where they are enough, and only there.
    assert not any("--kv" in line for line in error.tries)
    with pytest.raises(MemoryPlanError) as caught:
        plan_model([q4_0()], machine.restricted(ram=22 * GIB), wish)
    assert "nanorun plan nano --n-ctx 1048576 --kv q8_0" in caught.value.tries
    plan_model([q4_0()], machine.restricted(ram=22 * GIB), replace(wish, type_kv=GgmlType.Q8_0))
    serve = next(line for line in error.tries if "vllm serve" in line)
    assert serve.startswith("VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 vllm serve nvidia/Nano ")
    assert "--max-model-len 1048576 --max-num-seqs 1 " in serve
    assert error.tries[-1] == "nanorun chat --endpoint http://THAT-MACHINE:8000"
    assert "weights 16.6 GiB + KV cache f16 6.0 GiB" in error.facts[0]


def test_cushion_is_as_asked_and_named() -> None:
    machine = profile("cpu-24g")
    for leave, shown in (
        (0, "CPU 0 B; main memory for other programs as asked"),
        (3 * GIB, "CPU 3.0 GiB; main memory for other programs as asked"),
        (None, "CPU 1.4 GiB; main memory for other programs; --leave SIZE"),
    ):
        made = plan_model([q4_0()], machine.restricted(leave=leave), Wish(n_ctx=8 * K))
        assert made.uses[-1].margin_bytes == machine.restricted(leave=leave).host.cushion_bytes
        assert any(shown in line for line in decisions(made))
        assert f"kept free{format_gib(made.uses[-1].margin_bytes):>14}" in render_plan(made)


def test_cushion_that_alone_is_in_the_way_may_be_smaller() -> None:
    machine = profile("cpu-24g").restricted(leave=4 * GIB)
    wish = Wish(n_ctx=1024 * K, command="serve --leave 4294967296")
    with pytest.raises(MemoryPlanError) as caught:
        plan_model([q4_0()], machine, wish)
    (advice,) = [line for line in caught.value.tries if "--leave" in line.partition(" nano ")[2]]
    assert advice.startswith("nanorun serve nano --n-ctx 1048576 --leave ")
    plan_model([q4_0()], machine.restricted(leave=parse_size(advice.rpartition(" ")[2])), wish)
    # Where the model is too large whatever is left to others, nothing is said of them.
    with pytest.raises(MemoryPlanError) as caught:
        plan_model([q4_0()], machine.restricted(ram=16 * GIB), wish)
    assert not any(line.endswith("M") for line in caught.value.tries)
