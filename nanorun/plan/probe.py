"""Asks the installed engine, in a process of its own, and compares its answer with the formulas.

The engine is not imported here: the child is `python -m nanorun.runtime.probe`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanorun.errors import EngineDied, EngineError
from nanorun.model.arch import HybridArch
from nanorun.model.footprint import kv_bytes, mtp_kv_bytes, output_bytes, state_bytes
from nanorun.plan.compute_graph import compute_bytes, mtp_compute_bytes
from nanorun.plan.memory_use import Settings, graph_sizes

_TIMEOUT_S = 180.0
_MEASURE_TIMEOUT_S = 3600.0
PROBED = ("kv", "state", "compute", "output")
"""The parts of a context that the engine reports."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What the engine took when it was run for real."""

    weights_bytes: int
    context: Mapping[str, int]
    """By the names of `PROBED`."""
    base_bytes: int
    """The process before it loaded anything."""
    resident_bytes: int
    peak_bytes: int
    load_s: float
    prefill_tps: float
    decode_tps: float


def probe_contexts(path: Path, settings: Sequence[Settings]) -> list[dict[str, int]]:
    """What the engine says each context would take on the host, without loading weights.

    Raises:
        EngineError: If the engine refuses, or dies.
    """
    request = {"verb": "probe", "path": str(path), "contexts": [_context(s) for s in settings]}
    answer = _ask(request, _TIMEOUT_S)
    return [_flat(context) for context in answer["contexts"]]


def predicted_context(arch: HybridArch, settings: Settings) -> dict[str, int]:
    """The same by the formulas."""
    sizes, s = graph_sizes(settings), settings
    # Rows for drafted tokens are added when they are first asked for.
    if settings.with_mtp:
        return {
            "kv": mtp_kv_bytes(arch, s.n_ctx, s.type_k, s.type_v),
            "state": 0,
            "compute": mtp_compute_bytes(arch, sizes),
            "output": output_bytes(arch, s.n_seq_max),
        }
    return {
        "kv": kv_bytes(arch, s.n_ctx, s.type_k, s.type_v),
        "state": state_bytes(arch, s.n_seq_max, s.n_rs_seq),
        "compute": compute_bytes(arch, sizes),
        "output": output_bytes(arch, s.n_seq_max),
    }


def measure(path: Path, settings: Settings, n_fill: int) -> Measurement:
    """Load a model for real, fill `n_fill` tokens of its context, and decode a little.

    Raises:
        EngineError: If the engine cannot.
        EngineDied: If it was killed, which is what happens when memory runs out.
    """
    request = {
        "verb": "measure",
        "path": str(path),
        "context": _context(settings) | {"n_gpu_layers": settings.n_gpu_layers},
        "n_fill": n_fill,
    }
    answer = _ask(request, _MEASURE_TIMEOUT_S)
    return Measurement(
        weights_bytes=sum(answer["weights"].values()),
        context=_flat(answer),
        base_bytes=answer["base_bytes"],
        resident_bytes=answer["resident"]["rss"],
        peak_bytes=answer["peak_bytes"],
        load_s=answer["load_s"],
        prefill_tps=answer["prefill_tps"],
        decode_tps=answer["decode_tps"],
    )


def engine_devices() -> list[dict[str, Any]]:
    """The devices that the installed engine can use, as it sees them.

    Raises:
        EngineError: If it cannot be loaded.
    """
    devices: list[dict[str, Any]] = _ask({"verb": "devices"}, _TIMEOUT_S)["devices"]
    return devices


def _context(settings: Settings) -> dict[str, Any]:
    return {
        "n_ctx": settings.n_ctx,
        "n_ubatch": settings.n_ubatch,
        "n_seq_max": settings.n_seq_max,
        "n_rs_seq": settings.n_rs_seq,
        "type_k": settings.type_k.label,
        "type_v": settings.type_v.label,
        "mtp": settings.with_mtp,
    }


def _flat(context: Mapping[str, Any]) -> dict[str, int]:
    def total(value: Any) -> int:
        return sum(value.values()) if isinstance(value, dict) else int(value)

    return {part: total(context[part]) for part in PROBED}


def _ask(request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "nanorun.runtime.probe"]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise EngineDied(f"the engine gave no answer in {timeout_s:.0f} s") from error
    if done.returncode:
        raise EngineDied(
            f"the engine ended with {_exit_text(done.returncode)}", facts=list(_tail(done.stderr))
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise EngineError(answer["error"], facts=answer["facts"])
    return answer


def _exit_text(code: int) -> str:
    if code == -9:
        return "SIGKILL, as the system does when memory runs out"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _tail(text: str, n_lines: int = 4) -> Iterator[str]:
    yield from [line for line in text.splitlines() if line.strip()][-n_lines:]
