"""Cores of this machine and their kinds, as Linux tells them.

Work that is shared out evenly waits for the slowest core, so slow ones (E-cores, LITTLE, compact)
are counted apart: the engine is better off without them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_SYS = Path("/sys/devices")
# Favoured cores of one kind clock a few percent higher; compact ones a third lower.
_SAME_KIND = 0.8


@dataclass(frozen=True, slots=True)
class Cores:
    """Physical cores that this process may use."""

    n_fast: int
    n_slow: int = 0


def detect_cores(root: Path = _SYS, allowed: Iterable[int] | None = None) -> Cores | None:
    """The cores by kind; None where the system does not tell.

    Args:
        root: `/sys/devices`.
        allowed: Processors that the process may use; None for those of its affinity.
    """
    if allowed is None:
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    cpus = root / "system" / "cpu"
    # Threads of one core share it: each core counts once, by its first thread.
    cores = {_first_thread(cpus, i) for i in allowed}
    cores.discard(-1)
    if not cores:
        return None
    slow = cores & _slow_processors(root, cores)
    return Cores(n_fast=len(cores) - len(slow), n_slow=len(slow))


def _first_thread(cpus: Path, i: int) -> int:
    siblings = parse_cpu_list(_read(cpus / f"cpu{i}" / "topology" / "thread_siblings_list"))
    return min(siblings, default=-1)


def _slow_processors(root: Path, cores: set[int]) -> set[int]:
    # Intel's hybrids register their kinds; where all are of the slow kind, none is slower.
    efficient = parse_cpu_list(_read(root / "cpu_atom" / "cpus"))
    if efficient:
        return efficient if cores - efficient else set()
    for file in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        known = {i: _number(root / "system" / "cpu" / f"cpu{i}" / file) for i in cores}
        fastest = max(known.values())
        if fastest:
            return {i for i, speed in known.items() if 0 < speed < _SAME_KIND * fastest}
    return set()


def parse_cpu_list(text: str) -> set[int]:
    """Numbers of `0-3,8,10-11`; what is no such list counts as empty."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            continue
        numbers.update(range(int(first), min(int(last or first), int(first) + 4096) + 1))
    return numbers


def _number(path: Path) -> int:
    text = _read(path)
    return int(text) if text.isdecimal() else 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
