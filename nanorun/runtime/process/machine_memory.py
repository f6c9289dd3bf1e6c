"""How main memory stands: what is free beside the engine, and whether processes wait for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nanorun.model.cgroups import group_folders
from nanorun.model.main_memory import MainMemory, read_main_memory

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_RSS_FILE = re.compile(r"^RssFile:\s*(\d+) kB", re.MULTILINE)
_FULL = re.compile(r"^full avg10=(\d+(?:\.\d+)?)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class MemoryNow:
    """How main memory stands while a model is loaded."""

    free_bytes: int
    """What others can take before weights of the engine have to leave memory."""
    stalled: float = 0.0
    """The share of the last ten seconds in which nothing ran, since all waited for memory."""


class MachineMemory:
    """Reads it; a reading takes some milliseconds.

    Args:
        proc: `/proc`.
        cgroups: `/sys/fs/cgroup`.
    """

    def __init__(self, proc: Path = _PROC, cgroups: Path = _CGROUPS) -> None:
        self._proc = proc
        self._cgroups = cgroups

    def before_loading(self) -> MainMemory:
        """What a new process could take."""
        return read_main_memory(self._proc, self._cgroups)

    def beside(self, pid: int) -> MemoryNow:
        """What is free beside an engine's process.

        Weights that it maps are pages of a file, which the kernel counts as available. They are
        in use all the same: every token reads them.
        """
        available = self.before_loading().available_bytes
        return MemoryNow(max(0, available - self._mapped_bytes(pid)), self._stalled())

    def _mapped_bytes(self, pid: int) -> int:
        """Resident pages of files; 0 where the system does not tell."""
        found = _RSS_FILE.search(_read(self._proc / str(pid) / "status"))
        return int(found[1]) * 1024 if found else 0

    def _stalled(self) -> float:
        """The worst of the machine and the groups (Documentation/accounting/psi.rst)."""
        folders = group_folders("memory", self._proc / "self" / "cgroup", self._cgroups)
        files = [folder / "memory.pressure" for folder in folders]
        return max(map(_stalled, [self._proc / "pressure" / "memory", *files]))


def _stalled(file: Path) -> float:
    """`full avg10` of a pressure file, 0 to 1; 0 without one."""
    found = _FULL.search(_read(file))
    return float(found[1]) / 100 if found else 0.0


def _read(file: Path) -> str:
    # Kernels without pressure figures, or told not to count them, refuse to open or to read it.
    try:
        return file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
