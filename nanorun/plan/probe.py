"""Asks the installed engine, in a process of its own.

The engine is not imported here: the child is `python -m nanorun.runtime.measure.probe`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanorun.errors import EngineDied, EngineError, process_ending
from nanorun.model.engine_options import EngineOptions

_TIMEOUT_S = 180.0
_MEASURE_TIMEOUT_S = 3600.0
PROBED = ("kv", "state", "compute", "output")
"""The parts of a context that the engine reports."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What the engine took when it was run for real."""

    weights: Mapping[str, int]
    """Bytes by the engine's name of the buffer (`CPU_REPACK`, `CUDA0`); so are the next four."""
    kv: Mapping[str, int]
    state: Mapping[str, int]
    compute: Mapping[str, int]
    output: Mapping[str, int]
    gpu_bytes: Mapping[str, int]
    """What the process took of each GPU, as the driver counts; empty without one."""
    base_bytes: int
    """The process before it loaded anything."""
    resident_bytes: int
    proportional_bytes: int | None
    """The same with shared pages counted in parts (PSS); None where the kernel does not say."""
    peak_bytes: int
    load_s: float
    prefill_tps: float
    decode_tps: float


def probe_contexts(
    path: Path, contexts: Sequence[EngineOptions], *, head: bool = False
) -> list[dict[str, int]]:
    """What the engine says each context would take, on all devices, without loading weights.

    Args:
        path: The model, or a file with no more than its header.
        contexts: At least one; all place the layers as the first does.
        head: Ask about the contexts of the model's MTP head instead of the main ones.

    Returns:
        Bytes of each of `PROBED`, for each context.

    Raises:
        EngineError: If the engine refuses, or dies.
    """
    return _probe(path, [(options, head) for options in contexts])


def probe_plan(path: Path, options: EngineOptions) -> dict[str, int]:
    """Bytes of each of `PROBED` for a model as it is run: its context and that of its MTP head."""
    contexts = _probe(path, _contexts(options))
    return {part: sum(context[part] for context in contexts) for part in PROBED}


def _contexts(options: EngineOptions) -> list[tuple[EngineOptions, bool]]:
    """The contexts of a model as it is run, and whether each is the head's."""
    return [(options, head) for head in ((False, True) if options.with_mtp else (False,))]


def _probe(path: Path, contexts: Sequence[tuple[EngineOptions, bool]]) -> list[dict[str, int]]:
    request = {"verb": "probe", "path": str(path), "contexts": [_to_json(*c) for c in contexts]}
    return [_flat(context) for context in _ask(request, _TIMEOUT_S)["contexts"]]


def _to_json(options: EngineOptions, head: bool) -> dict[str, Any]:
    return {"options": asdict(options), "head": head}


def measure(path: Path, options: EngineOptions, n_fill: int) -> Measurement:
    """Load a model for real, fill `n_fill` tokens of its context, and decode a little.

    Raises:
        EngineError: If the engine cannot.
        EngineDied: If it was killed, which is what happens when memory runs out.
    """
    request = {
        "verb": "measure",
        "path": str(path),
        "contexts": [_to_json(*context) for context in _contexts(options)],
        "n_fill": n_fill,
    }
    return Measurement(**_ask(request, _MEASURE_TIMEOUT_S))


def engine_devices() -> list[dict[str, Any]]:
    """The devices that the installed engine can use, as it sees them.

    Raises:
        EngineError: If it cannot be loaded.
    """
    devices: list[dict[str, Any]] = _ask({"verb": "devices"}, _TIMEOUT_S)["devices"]
    return devices


def _flat(context: Mapping[str, Any]) -> dict[str, int]:
    def total(value: Any) -> int:
        return sum(value.values()) if isinstance(value, dict) else int(value)

    return {part: total(context[part]) for part in PROBED}


def _ask(request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "nanorun.runtime.measure.probe"]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=timeout_s,
            # ggml would start a debugger to print a backtrace of an abort.
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise EngineDied(f"the engine gave no answer in {timeout_s:.0f} s") from error
    if done.returncode:
        raise EngineDied(
            f"the engine's process {process_ending(done.returncode)}",
            facts=list(_last_words(done.returncode, done.stderr)),
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise EngineError(answer["error"], facts=answer["facts"])
    return answer


def _last_words(code: int, text: str, n_lines: int = 4) -> Iterator[str]:
    if hasattr(signal, "SIGKILL") and code == -signal.SIGKILL:
        yield "the system does that when memory runs out"
    yield from [line for line in text.splitlines() if line.strip()][-n_lines:]
