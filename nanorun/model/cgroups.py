"""Limits that a container or a service manager puts on this process (Linux control groups).

Memory of the whole machine means nothing inside a container: the kernel kills the process at the
group's limit. Both versions of the interface are read, and every group above the process counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanorun.model.units import format_gib

_PROC = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")
# Version 1 says "no limit" with the largest page-aligned number.
_UNLIMITED = 2**60


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The tightest group."""

    total_bytes: int
    free_bytes: int
    """What is left of it; cached file pages count as free, since the kernel drops them. Weights
    that were mapped more than once are among the active ones."""
    description: str


def memory_limit(proc: Path = _PROC, root: Path = _ROOT) -> MemoryLimit | None:
    """The limit on this process's memory, or None without one."""
    return min(_limits(proc, root), key=lambda limit: limit.free_bytes, default=None)


def n_cpus_allowed(proc: Path = _PROC, root: Path = _ROOT) -> int:
    """Processors that affinity and quota leave to this process, at least one."""
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = [
        quota
        for folder in group_folders("cpu", proc, root)
        if (quota := _cpu_quota(folder)) is not None
    ]
    return max(1, min([n_cpus or 1, *quotas]))


def _cpu_quota(folder: Path) -> int | None:
    quota, _, period = (_read(folder / "cpu.max") or "").partition(" ")
    if not period:
        quota = _read(folder / "cpu.cfs_quota_us") or ""
        period = _read(folder / "cpu.cfs_period_us") or ""
    try:
        cpus = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return -int(-cpus // 1) if cpus > 0 else None


def _limits(proc: Path, root: Path) -> Iterator[MemoryLimit]:
    for folder in group_folders("memory", proc, root):
        for version, limit_file, usage_file, prefix in (
            (2, "memory.max", "memory.current", ""),
            (2, "memory.high", "memory.current", ""),  # beyond it processes are slowed to a halt
            (1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            total, used = _number(folder / limit_file), _number(folder / usage_file)
            if total is None or used is None or total >= _UNLIMITED:
                continue
            cached = _cached_bytes(folder, prefix)
            text = f"cgroup v{version} limit {format_gib(total)}"
            yield MemoryLimit(total, max(0, total - max(0, used - cached)), text)


def group_folders(controller: str, proc: Path = _PROC, root: Path = _ROOT) -> Iterator[Path]:
    """The groups of this process and those above them, for either version.

    Args:
        controller: `memory` or `cpu`.
        proc: `/proc/self/cgroup`.
        root: `/sys/fs/cgroup`.
    """
    for line in (_read(proc) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base = root
        elif controller in controllers.split(","):
            base = root / controller
        else:
            continue
        relative = Path(path.lstrip("/"))
        for group in (relative, *relative.parents):
            # Inside a container the path may be that of the machine, and only the root is there.
            if ".." not in group.parts and (base / group).is_dir():
                yield base / group


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text and text.isdigit() else None


def _cached_bytes(folder: Path, prefix: str) -> int:
    """Pages of files, of which the kernel counts active ones apart."""
    # Read once: the kernel adds up the counters of all processors each time, which takes a while.
    text = _read(folder / "memory.stat") or ""
    fields = dict(line.split(" ", 1) for line in text.splitlines() if " " in line)
    numbers = [fields.get(f"{prefix}{kind}_file", "") for kind in ("inactive", "active")]
    return sum(int(number) for number in numbers if number.isdecimal())


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
