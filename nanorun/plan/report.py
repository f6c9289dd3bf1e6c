"""A plan as people and programs read it: a table with bars, lines of reasons, JSON keys."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nanorun.model.units import format_gib
from nanorun.plan.explain import decisions
from nanorun.plan.memory_use import PARTS, DeviceUse
from nanorun.plan.plan import Plan

_BAR_WIDTH = 50
_TITLES = {
    "weights_bytes": ("weights", "W"),
    "kv_bytes": ("KV cache", "K"),
    "state_bytes": ("SSM state", "S"),
    "checkpoint_bytes": ("checkpoints", "c"),
    "compute_bytes": ("compute", "C"),
    "output_bytes": ("output", "o"),
    "overhead_bytes": ("overhead", "v"),
}


def plan_keys(plan: Plan) -> dict[str, Any]:
    """The object that `plan --json` prints."""
    s = plan.options
    return {
        "fits": True,
        "model": plan.shape.name,
        "recipe": plan.shape.recipe,
        "n_ctx": s.n_ctx,
        "type_k": s.type_k.label,
        "type_v": s.type_v.label,
        "n_ubatch": s.n_ubatch,
        "n_gpu_layers": s.n_gpu_layers,
        "n_cpu_moe": s.n_cpu_moe,
        "n_seq_max": s.n_seq_max,
        "checkpoint_bytes": s.checkpoint_bytes,
        "archive_bytes": s.archive_bytes,
        "devices": [device_keys(use) for use in plan.uses],
        "decode_tps": round(plan.speed.decode_tps, 2),
        "prefill_tps": round(plan.speed.prefill_tps, 2),
        "uncertainty": plan.speed.uncertainty,
        "why": decisions(plan),
        "tries": [],
    }


def device_keys(use: DeviceUse) -> dict[str, Any]:
    """One device of a plan as JSON keys."""
    keys = asdict(use)
    free, margin = keys.pop("free_bytes"), keys.pop("margin_bytes")
    total = {"total_bytes": use.total_bytes, "free_bytes": free, "margin_bytes": margin}
    return keys | total


def render_plan(plan: Plan) -> str:
    """The plan as text: each device with its bar and table, then the reasons."""
    lines = [_headline(plan), ""]
    for use in plan.uses:
        lines += [*_device_lines(use), ""]
    lines += [f"  {line}" for line in decisions(plan)]
    return "\n".join(lines) + "\n"


def _headline(plan: Plan) -> str:
    recipe = f" ({plan.shape.recipe})" if plan.shape.recipe else ""
    return (
        f"{plan.shape.name}{recipe} on {plan.hardware.name}:"
        f" n_ctx {plan.options.n_ctx:,}, {plan.speed.render()}"
    )


def _device_lines(use: DeviceUse) -> list[str]:
    lines = [
        f"{use.name}  {format_gib(use.total_bytes)} of {format_gib(use.free_bytes)} free",
        f"  [{_bar(use)}]",
    ]
    for part in PARTS:
        title, letter = _TITLES[part]
        n_bytes = getattr(use, part)
        if n_bytes:
            lines.append(f"  {letter}  {title:<12}{format_gib(n_bytes):>11}")
    return [*lines, f"  .  {'kept free':<12}{format_gib(use.margin_bytes):>11}"]


def _bar(use: DeviceUse) -> str:
    """One letter for each fiftieth of the memory; a dot for what is left."""
    scale = _BAR_WIDTH / max(1, use.free_bytes, use.total_bytes)
    bar, end = "", 0.0
    for part in PARTS:
        end += getattr(use, part) * scale
        bar += _TITLES[part][1] * (round(end) - len(bar))
    return bar.ljust(_BAR_WIDTH, ".")
