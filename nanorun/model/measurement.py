"""What an engine took of memory and time when a model was run: what a plan is checked against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
