"""What to try when memory ran out after all: the next smaller plans, each with what it changes.

That a load or a decode failed shows that there is less memory than it seemed. So the planner is
asked again for less and less of it, and chooses by its own preferences what to give up: room for
saved prompts, spare sequences, batch size and precision of the KV cache, layers on the accelerator.
Context, and then requests at a time, are cut where that is not enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nanorun.model.engine_options import ALL_LAYERS, EngineOptions
from nanorun.model.footprint import state_bytes
from nanorun.model.ggml_type import GgmlType
from nanorun.model.units import format_gib
from nanorun.plan.machine.hardware import HOST, Hardware
from nanorun.plan.memory_plan import plan_shape
from nanorun.plan.memory_use import DeviceUse
from nanorun.plan.plan import Plan, Wish

# Of what a plan takes beside the weights, what the smaller ones are given.
_SHARES = (0.6, 0.35, 0.2, 0.1)
# The same of all that it takes of accelerators with memory of their own: weights can leave them.
_SHARES_WITH_WEIGHTS = (0.75, 0.5)
_SHORTEST_N_CTX = 2048
_NOTICED = 0.75


@dataclass(frozen=True, slots=True)
class SmallerPlan:
    """A plan that takes less than the one before it."""

    plan: Plan
    change: str
    """What a person would notice: `n_ctx 131,072 -> 65,536, KV cache f16 -> q8_0`."""


def smaller_plans(plan: Plan) -> list[SmallerPlan]:
    """Plans for less memory than `plan` takes, each smaller than the one before it."""
    found: list[SmallerPlan] = []
    last = plan
    for share, hardware in _less_and_less(plan):
        smaller = _plan_within(last, hardware)
        if smaller is None:
            continue
        smaller = _at_most(smaller, last, share)
        if _scarce_bytes(smaller) < _scarce_bytes(last):
            change = describe_change(last.options, smaller.options)
            found.append(SmallerPlan(smaller, change))
            last = smaller
    return found


def describe_change(before: EngineOptions, after: EngineOptions) -> str:
    """What differs between two ways to open a model, the most noticeable first."""
    changes = [
        f"{name} {old} -> {new}"
        for name, old, new in (
            ("n_ctx", f"{before.n_ctx:,}", f"{after.n_ctx:,}"),
            ("requests at a time", before.n_parallel, after.n_parallel),
            ("KV cache", before.type_k.label, after.type_k.label),
            ("layers on the accelerator", _layers(before), _layers(after)),
            ("blocks with experts in main memory", before.n_cpu_moe, after.n_cpu_moe),
            ("n_ubatch", before.n_ubatch, after.n_ubatch),
            ("spare sequences", before.n_seq_spare, after.n_seq_spare),
        )
        if old != new
    ]
    if _saved_bytes(after) < _NOTICED * _saved_bytes(before):
        old, new = format_gib(_saved_bytes(before)), format_gib(_saved_bytes(after))
        changes.append(f"room for saved prompts {old} -> {new}")
    return ", ".join(changes)


def _layers(options: EngineOptions) -> str:
    return "all" if options.n_gpu_layers == ALL_LAYERS else str(options.n_gpu_layers)


def _saved_bytes(options: EngineOptions) -> int:
    return options.checkpoint_bytes + options.archive_bytes


def _less_and_less(plan: Plan) -> Iterator[tuple[float, Hardware]]:
    """The machine with ever less of the memory that the plan takes, and how much less."""
    hardware = plan.hardware
    if not _has_scarce_gpus(plan):
        for share in _SHARES:
            (use,) = plan.uses
            yield share, _with_pool(hardware, _limit(use, share))
        return
    # Main memory is not what is scarce here: experts and layers may go there.
    gpu_uses = [use for use in plan.uses if use.name != HOST]
    for share in _SHARES:
        yield share, _with_gpus(hardware, [_limit(use, share) for use in gpu_uses])
    for share in _SHARES_WITH_WEIGHTS:
        limits = [round(share * use.total_bytes) + use.margin_bytes for use in gpu_uses]
        yield _SHARES[-1], _with_gpus(hardware, limits)
    yield _SHARES[-1], hardware.restricted("cpu")


def _limit(use: DeviceUse, share: float) -> int:
    fixed = use.weights_bytes + use.overhead_bytes
    return fixed + use.margin_bytes + round(share * (use.total_bytes - fixed))


def _with_pool(hardware: Hardware, n_bytes: int) -> Hardware:
    """The machine with less main memory, which its accelerators, if any, share."""
    gpus = tuple(replace(gpu, free_bytes=n_bytes) for gpu in hardware.accelerators)
    host = replace(hardware.host, available_bytes=n_bytes)
    return replace(hardware, host=host, accelerators=gpus)


def _with_gpus(hardware: Hardware, limits: list[int]) -> Hardware:
    pairs = zip(hardware.accelerators, limits, strict=True)
    gpus = tuple(replace(gpu, free_bytes=n_bytes) for gpu, n_bytes in pairs)
    return replace(hardware, accelerators=gpus)


def _has_scarce_gpus(plan: Plan) -> bool:
    """Whether the plan uses accelerators with memory of their own."""
    return len(plan.uses) > 1


def _scarce_bytes(plan: Plan) -> int:
    """What a plan takes of the memory that is scarce: the accelerators', or all there is."""
    if not plan.hardware.accelerators:
        return sum(use.total_bytes for use in plan.uses if use.name == HOST)
    return sum(use.total_bytes for use in plan.uses if use.name != HOST)


def _plan_within(last: Plan, hardware: Hardware) -> Plan | None:
    plans = (plan_shape(last.shape, hardware, wish) for wish in _wishes(last))
    return next((plan for plan in plans if plan is not None), None)


def _wishes(last: Plan) -> Iterator[Wish]:
    """What may be asked for, at most what there was: some context goes, then requests, then all."""
    options = last.options
    for n_parallel in _halvings(options.n_parallel, 1):
        shortest = _SHORTEST_N_CTX if n_parallel == 1 else options.n_ctx // 4
        for n_ctx in _halvings(options.n_ctx, max(_SHORTEST_N_CTX, shortest)):
            fixed = replace(last.wish.fixed, n_parallel=n_parallel)
            wish = replace(last.wish, n_ctx=n_ctx, fixed=fixed)
            if options.type_k is not GgmlType.F16:
                yield replace(wish, type_kv=options.type_k)
            yield wish


def _halvings(number: int, least: int) -> Iterator[int]:
    yield number
    while number > least:
        number = max(least, number // 2)
        yield number


def _at_most(smaller: Plan, last: Plan, share: float) -> Plan:
    """The plan without what it would take more of, and with a share of the room for prompts."""
    options, before = smaller.options, last.options
    least = 2 * state_bytes(smaller.shape.arch)
    checkpoints = max(least, round(share * before.checkpoint_bytes))
    options = replace(
        options,
        n_batch=min(options.n_batch, before.n_batch),
        n_ubatch=min(options.n_ubatch, before.n_ubatch),
        n_seq_spare=min(options.n_seq_spare, before.n_seq_spare),
        checkpoint_bytes=min(options.checkpoint_bytes, checkpoints),
        archive_bytes=min(options.archive_bytes, round(share * before.archive_bytes)),
    )
    return replace(smaller, options=options)
