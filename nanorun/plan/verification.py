"""A plan beside what the engine reckons (`plan --probe`) and what a load took (`plan --verify`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nanorun.model.footprint import output_bytes, padded_n_ctx
from nanorun.model.measurement import PROBED, Measurement
from nanorun.model.units import MIB, format_gib
from nanorun.plan.graph.compute_graph import mask_bytes
from nanorun.plan.machine.hardware import HOST
from nanorun.plan.memory_use import DeviceUse
from nanorun.plan.plan import Plan
from nanorun.plan.report import device_keys

_PARTS = ("weights", *PROBED)
# `CUDA0` and `Metal1` are devices; `CPU`, `CPU_REPACK`, `CPU_Mapped` and `CUDA_Host` are main
# memory.
_PRINTED_BYTES = MIB // 200
_ON_DEVICE = re.compile(r"[A-Za-z]+[0-9]+")


@dataclass(frozen=True, slots=True)
class Row:
    """One part of all devices, or one device as a whole."""

    part: str
    predicted: int
    probed: int | None
    """By the engine's own reckoning; None for what it does not reckon."""
    measured: int

    @property
    def error(self) -> float:
        """How far the plan is off, as a part of what was measured.

        The engine prints MiB with two decimals: what is finer than that is no error.
        """
        off = max(0, abs(self.predicted - self.measured) - _PRINTED_BYTES)
        return off / self.measured if self.measured else float(off > 0)


def _predicted(plan: Plan, part: str) -> int:
    """What a part takes on all devices, before a reply has guessed ahead."""
    n_bytes: int = sum(getattr(use, f"{part}_bytes") for use in plan.uses)
    return n_bytes - (_output_for_guesses(plan) if part == "output" else 0)


def _output_for_guesses(plan: Plan) -> int:
    """Rows of logits that the engine only adds when they are first asked for."""
    arch, options = plan.shape.arch, plan.options
    return output_bytes(arch, options.n_outputs_max) - output_bytes(arch, options.n_seq_max)


@dataclass(frozen=True, slots=True)
class Verification:
    """A plan, what the engine reckons its context takes, and what a real load took."""

    plan: Plan
    probed: Mapping[str, int]
    measured: Measurement
    n_fill: int
    """Tokens that were in the context at the end."""

    @property
    def rows(self) -> list[Row]:
        """Each part over all devices, then each device at its peak."""
        rows = [
            Row(
                part,
                _predicted(self.plan, part),
                self.probed.get(part),
                sum(self._buffers(part).values()),
            )
            for part in _PARTS
        ]
        return [*rows, *self._totals()]

    def _totals(self) -> Iterator[Row]:
        measured = self.measured
        for use in self.plan.uses:
            expected = use.total_bytes - use.checkpoint_bytes
            if self._is_host(use):
                found = measured.peak_bytes
                # One memory for all: what the driver counts is not resident, but taken from it.
                found += sum(measured.gpu_bytes.values()) if use.name != HOST else 0
                unused = self._untouched_bytes() + _output_for_guesses(self.plan)
                yield Row(f"{use.name} total", expected - unused, None, found)
            elif use.name in measured.gpu_bytes:
                yield Row(f"{use.name} total", expected, None, measured.gpu_bytes[use.name])

    def _is_host(self, use: DeviceUse) -> bool:
        return use.name == HOST or self.plan.hardware.is_unified

    def _untouched_bytes(self) -> int:
        """Of the mask, what is reserved but never written, as the context is not full."""
        options = self.plan.options
        n_used = min(options.n_ctx, padded_n_ctx(self.n_fill))
        whole = mask_bytes(options.n_ctx, options.n_ubatch)
        return whole - mask_bytes(n_used, options.n_ubatch)

    @property
    def max_error(self) -> float:
        """The largest of all rows."""
        return max(row.error for row in self.rows)

    @property
    def devices(self) -> list[DeviceUse]:
        """What each device of the plan really held.

        The overhead is what the kernel or the driver counts beyond the engine's buffers. No prompt
        was saved, so there are no checkpoints.
        """
        return [self._device(use) for use in self.plan.uses]

    def _device(self, use: DeviceUse) -> DeviceUse:
        parts = {part: self._buffers(part)[use.name] for part in _PARTS}
        if use.name != HOST and self.plan.hardware.is_unified:
            parts = {part: sum(self._buffers(part).values()) for part in _PARTS}
        totals = {row.part: row.measured for row in self._totals()}
        total = totals.get(f"{use.name} total", 0)
        touched = sum(parts.values()) - (self._untouched_bytes() if self._is_host(use) else 0)
        return DeviceUse(
            name=use.name,
            **{f"{part}_bytes": n_bytes for part, n_bytes in parts.items()},
            overhead_bytes=max(0, total - touched),
            free_bytes=use.free_bytes,
            margin_bytes=use.margin_bytes,
        )

    def _buffers(self, part: str) -> Counter[str]:
        """Bytes of a part by device of the plan."""
        by_device: Counter[str] = Counter()
        for buffer, n_bytes in getattr(self.measured, part).items():
            by_device[buffer if _ON_DEVICE.fullmatch(buffer) else HOST] += n_bytes
        return by_device


@dataclass(frozen=True, slots=True)
class Probe:
    """A plan, and what the engine reckons its context takes."""

    plan: Plan
    probed: Mapping[str, int]

    @property
    def rows(self) -> list[Row]:
        """Each part over all devices; the engine's reckoning stands for a measurement."""
        return [Row(part, _predicted(self.plan, part), None, self.probed[part]) for part in PROBED]

    @property
    def max_error(self) -> float:
        """The largest of all rows."""
        return max(row.error for row in self.rows)


def probe_keys(found: Probe) -> dict[str, Any]:
    """What `plan --probe --json` adds."""
    return {
        "probed": {f"{part}_bytes": n_bytes for part, n_bytes in found.probed.items()},
        "max_error": found.max_error,
    }


def render_probe(found: Probe) -> str:
    """The comparison as a table."""
    lines = [f"{'':<12}{'predicted':>12}{'the engine':>12}{'error':>9}"]
    lines += [
        f"{row.part:<12}{format_gib(row.predicted):>12}{format_gib(row.measured):>12}"
        f"{row.error:>9.2%}"
        for row in found.rows
    ]
    return "\n".join(lines) + "\n"


def verification_keys(verified: Verification) -> dict[str, Any]:
    """What `plan --verify --json` adds."""
    measured = verified.measured
    return {
        "measured": [device_keys(use) for use in verified.devices],
        "comparison": [asdict(row) | {"error": row.error} for row in verified.rows],
        "max_error": verified.max_error,
        "measured_decode_tps": round(measured.decode_tps, 2),
        "measured_prefill_tps": round(measured.prefill_tps, 2),
        "load_s": round(measured.load_s, 2),
        "base_bytes": measured.base_bytes,
        "resident_bytes": measured.resident_bytes,
        "proportional_bytes": measured.proportional_bytes,
        "peak_bytes": measured.peak_bytes,
        "gpu_bytes": dict(measured.gpu_bytes),
    }


def render_verification(verified: Verification) -> str:
    """The comparison as a table, and what was measured beside it."""
    measured = verified.measured
    proportional = measured.proportional_bytes
    shared = "" if proportional is None else f" ({format_gib(proportional)} PSS)"
    lines = [
        *_table(verified.rows),
        f"process: {format_gib(measured.peak_bytes)} resident at its peak,"
        f" {format_gib(measured.resident_bytes)}{shared} with {verified.n_fill:,} tokens",
        f"measured: decode {measured.decode_tps:.1f} t/s, prefill {measured.prefill_tps:.1f} t/s,"
        f" load {measured.load_s:.1f} s",
    ]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> Iterator[str]:
    yield f"{'':<12}{'predicted':>12}{'probed':>12}{'allocated':>12}{'error':>9}"
    for row in rows:
        probed = "" if row.probed is None else format_gib(row.probed)
        yield (
            f"{row.part:<12}{format_gib(row.predicted):>12}{probed:>12}"
            f"{format_gib(row.measured):>12}{row.error:>9.2%}"
        )
