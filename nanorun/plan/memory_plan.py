"""Choosing how a model is opened on a machine, and saying why.

Pure: a shape, the hardware and a wish go in, a plan comes out. Everything that fits is compared by
what it costs the person: a plan gives up spare sequences first, then batch size, then precision of
the KV cache, and moves experts to the host only if nothing else helps.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from nanorun.errors import MemoryPlanError, UsageError
from nanorun.model.engine_options import ALL_LAYERS, EngineOptions
from nanorun.model.footprint import padded_n_ctx, state_bytes
from nanorun.model.ggml_type import GgmlType
from nanorun.model.units import GIB, MIB, format_gib
from nanorun.plan import explain
from nanorun.plan.machine.hardware import Hardware
from nanorun.plan.memory_use import DeviceUse, device_uses
from nanorun.plan.plan import Plan, Wish
from nanorun.plan.shape import ModelShape
from nanorun.plan.speed_estimate import Calibration

MAX_SEQUENCES = 256
"""LLAMA_MAX_SEQ of llama.cpp: sequences that a context can tell apart."""
KV_TYPES = (GgmlType.F16, GgmlType.Q8_0, GgmlType.Q4_0)
"""Types of the KV cache that are considered, the most precise first."""
_N_CTX_STEP = 256
# Less than this left to other programs is nothing to advise.
_LEAST_CUSHION = 256 * MIB
# Below it answers get noticeably worse, so no fewer are taken for speed alone.
_ENOUGH_BITS = 4.4
# A batch costs time when it is small: on CUDA the fast scan starts above 128 tokens.
_UBATCHES = {512: 0, 256: 2, 128: 6}
_SPARES = {4: 0, 2: 1, 1: 2, 0: 4}
# Costs up to here are hardly felt; up to there they are still a plan.
_COMFORT, _FRUGAL = 11, 100
_NEARLY = 0.93
_KV_COSTS = {GgmlType.F16: 0, GgmlType.Q8_0: 5, GgmlType.Q4_0: 20}


def plan_model(
    shapes: Sequence[ModelShape],
    hardware: Hardware,
    wish: Wish,
    calibration: Calibration | None = None,
) -> Plan:
    """The plan for a model on a machine.

    Args:
        shapes: The model, once for each recipe that may be chosen, the most precise first; a file
            is one shape.
        hardware: The machine, or the part of it that may be used.
        wish: What is wanted.
        calibration: A measurement of this machine.

    Raises:
        UsageError: If the wish cannot be meant.
        MemoryPlanError: If nothing fits; it says what would.
    """
    check_wish(shapes[0], wish)
    n_threads = wish.fixed.n_threads or hardware.host.n_cores
    wish = replace(wish, fixed=replace(wish.fixed, n_threads=n_threads))
    is_max = wish.n_ctx is None
    if is_max and len(shapes) > 1:
        # The smallest recipe allows the longest context; the others are measured by it.
        wish = replace(wish, n_ctx=longest_n_ctx(shapes[-1], hardware, wish))
    plan = _plan(shapes, hardware, wish, calibration)
    return replace(plan, wish=replace(plan.wish, n_ctx=None)) if is_max else plan


def _plan(
    shapes: Sequence[ModelShape],
    hardware: Hardware,
    wish: Wish,
    calibration: Calibration | None,
) -> Plan:
    if len(shapes) == 1:
        plan = plan_shape(shapes[0], hardware, wish, calibration)
    else:
        plan = _choose_recipe(shapes, hardware, wish, calibration)
    if plan is None:
        raise _no_plan(shapes, hardware, wish)
    return plan


def _choose_recipe(
    shapes: Sequence[ModelShape],
    hardware: Hardware,
    wish: Wish,
    calibration: Calibration | None,
) -> Plan | None:
    # Precision is cheap while everything lies on an accelerator with memory of its own; elsewhere
    # each bit is paid for in speed, as bandwidth is what is short.
    if hardware.accelerators and not hardware.is_unified:
        for limit in (_COMFORT, _FRUGAL):
            for shape in shapes:
                whole = _plan_whole(shape, hardware, wish, calibration, limit)
                if whole is not None:
                    where = " and ".join(gpu.name for gpu in hardware.accelerators)
                    reason = f"the most bits of which everything fits {where}"
                    return replace(whole, recipe_reason=reason)
    precise = [shape for shape in shapes if shape.fewest_bits >= _ENOUGH_BITS]
    plans = [p for s in precise if (p := plan_shape(s, hardware, wish, calibration))]
    if plans:
        fastest = max(plans, key=lambda plan: plan.speed.decode_tps)
        return replace(fastest, recipe_reason="the fastest of those with 4 bits and more")
    rest = (plan_shape(s, hardware, wish, calibration) for s in shapes if s not in precise)
    first = next((plan for plan in rest if plan), None)
    return first and replace(first, recipe_reason="the most bits that fit")


def check_wish(shape: ModelShape, wish: Wish) -> None:
    """Refuse what no amount of memory would make possible.

    Raises:
        UsageError: Naming the number and the limit.
    """
    n_train, n_ctx = shape.arch.n_ctx_train, wish.n_ctx
    is_too_long = n_ctx is not None and n_ctx > n_train * max(1, wish.fixed.n_parallel)
    if n_ctx is not None and (n_ctx < 1 or (is_too_long and not wish.keeps_texts)):
        each = f" for each of {wish.fixed.n_parallel} requests" if wish.fixed.n_parallel > 1 else ""
        raise UsageError(
            f"n_ctx {n_ctx:,} is outside what {shape.name} was trained for: 1 to {n_train:,}{each}",
            tries=[f"nanorun {wish.command} {shlex.quote(shape.name)} --n-ctx max"],
        )
    if wish.fixed.speculation == "mtp" and not shape.arch.n_layer_nextn:
        raise UsageError(
            f"{shape.name} has no MTP head",
            facts=["guessing from earlier text needs none"],
            tries=[
                # Of `plan`, the command holds the flag itself.
                f"nanorun {wish.command.partition(' --draft ')[0]} {shlex.quote(shape.name)}"
                " --draft lookup"
            ],
        )
    if not 1 <= wish.fixed.n_parallel <= MAX_SEQUENCES:
        raise UsageError(
            f"{wish.fixed.n_parallel} sequences asked for, but the engine keeps"
            f" 1 to {MAX_SEQUENCES} apart",
            tries=[f"nanorun {wish.command} {shlex.quote(shape.name)} --parallel 8"],
        )


def longest_n_ctx(shape: ModelShape, hardware: Hardware, wish: Wish) -> int | None:
    """The longest context that fits at all, or None if not even the shortest does."""
    return _longest(shape, hardware, wish, lambda s, h, tried: _place(s, h, tried) is not None)


def _longest(
    shape: ModelShape,
    hardware: Hardware,
    wish: Wish,
    fits: Callable[[ModelShape, Hardware, EngineOptions], bool],
) -> int | None:
    def does(n_ctx: int) -> bool:
        frugal = _with_least_checkpoints(shape, _smallest(replace(wish, n_ctx=n_ctx), hardware))
        return fits(shape, hardware, frugal)

    if does(shape.arch.n_ctx_train):
        return shape.arch.n_ctx_train
    low, high = 0, shape.arch.n_ctx_train // _N_CTX_STEP
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if does(middle * _N_CTX_STEP) else (low, middle)
    return low * _N_CTX_STEP or None


def _fits(shape: ModelShape, hardware: Hardware, options: EngineOptions) -> bool:
    return all(use.spare_bytes >= 0 for use in device_uses(shape, options, hardware))


def plan_shape(
    shape: ModelShape, hardware: Hardware, wish: Wish, calibration: Calibration | None = None
) -> Plan | None:
    """The plan for one shape and a wish that can be meant; None if nothing fits.

    All on accelerators if that fits, else spread over them and the host.
    """
    if hardware.accelerators:
        plan = _plan_whole(shape, hardware, wish, calibration, _FRUGAL)
        if plan is not None:
            return plan
    n_ctx = wish.n_ctx or longest_n_ctx(shape, hardware, wish)
    frugal = _smallest(replace(wish, n_ctx=n_ctx), hardware) if n_ctx else None
    if frugal is None or _place(shape, hardware, frugal) is None:
        return None
    economies = list(_economies(replace(wish, n_ctx=n_ctx), hardware, _FRUGAL))
    if hardware.accelerators:
        # Each byte on the accelerator is better spent on experts than on comfort.
        economies = _representatives(economies)
    placed = (_place(shape, hardware, options) for options in economies)
    plans = (
        Plan(shape, _with_checkpoints(shape, hardware, options), hardware, wish, calibration)
        for options in placed
        if options is not None
    )
    if not hardware.accelerators:
        return next(plans, None)
    found = list(plans)
    fastest = max((plan.speed.decode_tps for plan in found), default=0.0)
    # The most comfortable of those that are about as fast.
    return next((p for p in found if p.speed.decode_tps >= _NEARLY * fastest), None)


def _plan_whole(
    shape: ModelShape,
    hardware: Hardware,
    wish: Wish,
    calibration: Calibration | None,
    most_cost: int,
) -> Plan | None:
    """The plan that keeps all layers on accelerators, if there is one."""
    if not hardware.is_unified and shape.weights_bytes - shape.embedding_bytes > sum(
        gpu.free_bytes for gpu in hardware.accelerators
    ):
        return None
    n_ctx = wish.n_ctx or _longest(shape, hardware, wish, _fits)
    if n_ctx is None:
        return None
    for options in _economies(replace(wish, n_ctx=n_ctx), hardware, most_cost):
        options = _with_least_checkpoints(shape, options)
        if _fits(shape, hardware, options):
            settled = _with_checkpoints(shape, hardware, options)
            return Plan(shape, settled, hardware, wish, calibration)
    return None


def _representatives(economies: Sequence[EngineOptions]) -> list[EngineOptions]:
    """One economy for each type of the KV cache, the most comfortable with large batches."""
    by_type: dict[GgmlType, EngineOptions] = {}
    for options in economies:
        by_type.setdefault(options.type_k, options)
    return list(dict.fromkeys([*by_type.values(), economies[-1]]))


def _economies(wish: Wish, hardware: Hardware, most_cost: int) -> Iterator[EngineOptions]:
    """EngineOptions that meet the wish, from the most comfortable to the most frugal."""
    assert wish.n_ctx is not None
    kv_types = [wish.type_kv] if wish.type_kv else list(_kv_types(hardware))
    most = MAX_SEQUENCES - wish.fixed.n_parallel
    spares = [n for n in _SPARES if n <= most]
    choices = [
        (_KV_COSTS.get(kv, 0) + _UBATCHES.get(n_ubatch, 0) + _SPARES.get(spare, 0), i, options)
        for i, (kv, n_ubatch, spare) in enumerate(
            (kv, n_ubatch, spare) for kv in kv_types for n_ubatch in _UBATCHES for spare in spares
        )
        for options in [_options(wish, kv, n_ubatch, spare)]
    ]
    for cost, _, options in sorted(choices, key=lambda choice: choice[:2]):
        if cost <= most_cost:
            yield options


def _kv_types(hardware: Hardware) -> tuple[GgmlType, ...]:
    # With 4-bit KV, prefill on unified memory was reported to fall to a tenth.
    return KV_TYPES[:2] if hardware.is_unified else KV_TYPES


def _smallest(wish: Wish, hardware: Hardware) -> EngineOptions:
    """The most frugal options that are chosen without being asked for."""
    kv = wish.type_kv or _kv_types(hardware)[-1]
    return _options(wish, kv, min(_UBATCHES), 0)


def _options(wish: Wish, kv: GgmlType, n_ubatch: int, n_seq_spare: int) -> EngineOptions:
    assert wish.n_ctx is not None
    return replace(
        wish.fixed,
        n_ctx=padded_n_ctx(wish.n_ctx), n_seq_spare=n_seq_spare, n_batch=n_ubatch,
        n_ubatch=n_ubatch, type_k=kv, type_v=kv, n_gpu_layers=ALL_LAYERS, n_cpu_moe=0,
        checkpoint_bytes=0, archive_bytes=0,
    )  # fmt: skip


# -- placement ----------------------------------------------------------------------------------


def _place(shape: ModelShape, hardware: Hardware, options: EngineOptions) -> EngineOptions | None:
    """The options with as much on the accelerators as fits, or None."""
    options = _with_least_checkpoints(shape, options)
    for candidate in _placements(shape, hardware, options):
        if _fits(shape, hardware, candidate):
            return candidate
    return None


def _placements(
    shape: ModelShape, hardware: Hardware, options: EngineOptions
) -> Iterator[EngineOptions]:
    if hardware.accelerators:
        yield options
        yield from _offloads(shape, hardware, options)
    if not hardware.is_unified:
        yield replace(options, n_gpu_layers=0)


def _offloads(
    shape: ModelShape, hardware: Hardware, options: EngineOptions
) -> Iterator[EngineOptions]:
    """The fewest experts, or else layers, on the host for which the accelerators suffice."""
    if hardware.is_unified:
        return

    def fits(candidate: EngineOptions) -> bool:
        uses = device_uses(shape, candidate, hardware)
        return all(use.spare_bytes >= 0 for use in uses[:-1])

    n_layer = shape.arch.n_layer
    steps = [
        replace(options, n_cpu_moe=i + 1)
        for i, layer in enumerate(shape.layers[:n_layer])
        if layer.experts
    ]
    if steps and fits(steps[-1]):
        yield _first_fitting(steps, fits)
        return
    base = steps[-1] if steps else options
    layers = [replace(base, n_gpu_layers=n) for n in range(shape.arch.n_layer_all, 0, -1)]
    if layers and fits(layers[-1]):
        yield _first_fitting(layers, fits)


def _first_fitting(
    steps: Sequence[EngineOptions], fits: Callable[[EngineOptions], bool]
) -> EngineOptions:
    """The first of steps that ever more of fit; the last one does."""
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(steps[middle]) else (middle + 1, high)
    return steps[low]


# -- checkpoints --------------------------------------------------------------------------------


def _with_least_checkpoints(shape: ModelShape, options: EngineOptions) -> EngineOptions:
    # Two turns of the conversation at hand, without which each turn reads everything again.
    return replace(options, checkpoint_bytes=2 * state_bytes(shape.arch), archive_bytes=0)


def _with_checkpoints(
    shape: ModelShape, hardware: Hardware, options: EngineOptions
) -> EngineOptions:
    """As many states in host memory as are useful and leave half of what is free to others."""
    spare = device_uses(shape, options, hardware)[-1].spare_bytes
    least, share = options.checkpoint_bytes, max(0, spare) // 4
    return replace(
        options,
        checkpoint_bytes=max(least, min(GIB, least + share)),
        archive_bytes=min(2 * GIB, share),
    )


def _no_plan(shapes: Sequence[ModelShape], hardware: Hardware, wish: Wish) -> MemoryPlanError:
    shape = shapes[-1]
    n_ctx = wish.n_ctx or _N_CTX_STEP
    options = _with_least_checkpoints(shape, _smallest(replace(wish, n_ctx=n_ctx), hardware))
    if not hardware.is_unified:
        options = replace(options, n_gpu_layers=0)
    use = device_uses(shape, options, hardware)[-1]
    longest = None if wish.n_ctx is None else longest_n_ctx(shape, hardware, wish)

    def fits(other: Wish) -> bool:
        return (longest_n_ctx(shape, hardware, other) or 0) >= n_ctx

    return MemoryPlanError(
        f"{shape.name} at n_ctx {n_ctx:,} needs {format_gib(use.total_bytes)} at least,"
        f" but {use.name} has {format_gib(use.free_bytes)} free",
        facts=explain.shortfall(use, options, hardware),
        tries=explain.what_would_help(
            shape,
            wish,
            longest,
            has_choice=len(shapes) > 1,
            fits=fits,
            cushion=_smaller_cushion(use, hardware),
        ),
    )


def _smaller_cushion(use: DeviceUse, hardware: Hardware) -> int | None:
    """What would be left to other programs if a wish were met that the cushion is in the way of."""
    left = use.free_bytes - use.total_bytes
    is_enough = _LEAST_CUSHION <= left < hardware.host.cushion_bytes
    return left if is_enough and use.margin_bytes == hardware.host.cushion_bytes else None
