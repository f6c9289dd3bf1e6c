"""Main memory as this process may really take it, and what of it is left to others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanorun.errors import LibraryError
from nanorun.model.cgroups import memory_limit
from nanorun.model.units import GIB, MIB

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MainMemory:
    """Main memory within every limit on this process."""

    total_bytes: int
    available_bytes: int
    """What a process can take without pushing another one out. Cached files count: those of a
    model that was loaded before are there to be used again, or to be dropped."""
    limit: str | None = None
    """What holds it below the machine's own: `cgroup v2 limit 8.0 GiB`."""


def read_main_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> MainMemory:
    """What there is now; takes some milliseconds.

    Args:
        proc: `/proc`.
        cgroups: `/sys/fs/cgroup`.

    Raises:
        LibraryError: If the system has no `/proc/meminfo` and psutil is missing.
    """
    total, available = _of_machine(proc)
    limit = memory_limit(proc / "self" / "cgroup", cgroups)
    if limit is None:
        return MainMemory(total, available)
    is_tighter = limit.free_bytes < available
    return MainMemory(
        min(total, limit.total_bytes),
        min(available, limit.free_bytes),
        limit.description if is_tighter else None,
    )


def _of_machine(proc: Path) -> tuple[int, int]:
    """Bytes in all, and those available."""
    fields: dict[str, int] = {}
    try:
        for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            number = value.split()[0] if value.split() else ""
            if number.isdecimal():
                fields[name] = int(number) * 1024
        return fields["MemTotal"], fields["MemAvailable"]
    except (OSError, ValueError, KeyError):
        return _by_psutil()


def _by_psutil() -> tuple[int, int]:
    try:
        import psutil
    except ImportError as error:
        raise LibraryError("psutil is missing", tries=["pip install psutil"]) from error
    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)


def default_cushion(total_bytes: int, *, is_limited: bool) -> int:
    """Bytes that a plan leaves to other programs unless a person says how many.

    A browser or a build takes gigabytes while a model is loaded, and where nothing is left the
    kernel ends the largest process, which is the engine. So 6 % of memory stay free, 1 GiB at
    least; on machines of less than 8 GiB an eighth, which is what their users can spare. What a
    control group holds apart is not shared with a desktop: there 2 % are for what cannot be known.

    Args:
        total_bytes: Memory of the machine, or of the group.
        is_limited: Whether it is a control group's.
    """
    least = 384 * MIB
    if is_limited:
        return max(least, total_bytes // 50)
    return max(least, min(max(GIB, total_bytes * 6 // 100), total_bytes // 8))
