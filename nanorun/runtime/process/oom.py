"""Was it memory? What the kernel and the engine's last words say about a process that ended."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanorun.model.cgroups import group_folders

_SIGKILL = 9
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
# Linux counts the processes that it ended for want of memory, for the whole machine and for each
# control group (Documentation/admin-guide/cgroup-v2.rst, memory.events; cgroup-v1/memory.rst).
_OF_MACHINE = "vmstat"
_OF_GROUP = ("memory.events", "memory.oom_control")
_OOM_KILLS = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
# Readings kept: a large process takes seconds to end, and a kill of last week is no evidence.
_N_READINGS = 7
# ggml and CUDA say one of these before they abort.
_WORDS = re.compile(
    r"out of memory|failed to allocate|unable to allocate|cudaMalloc failed|bad_alloc",
    re.IGNORECASE,
)


class KillCounter:
    """The kernel's count of processes that it ended for want of memory, and whether it has risen.

    Args:
        proc: `/proc`.
        cgroups: `/sys/fs/cgroup`.
    """

    def __init__(self, proc: Path = _PROC, cgroups: Path = _CGROUPS) -> None:
        self._proc = proc
        self._cgroups = cgroups
        self._readings = deque([self.count()], maxlen=_N_READINGS)

    def note(self) -> None:
        """Read it now and then, so that `has_risen` is about what happened lately."""
        self._readings.append(self.count())

    def has_risen(self) -> bool:
        """Whether it is higher than at the oldest of the last readings."""
        return self.count() > self._readings[0]

    def count(self) -> int:
        """Processes so far, those of a group once more for each group; 0 where nobody says."""
        total = 0
        for path in self._files():
            try:
                total += sum(map(int, _OOM_KILLS.findall(path.read_text(encoding="ascii"))))
            except (OSError, ValueError):
                continue
        return total

    def _files(self) -> Iterator[Path]:
        yield self._proc / _OF_MACHINE
        for folder in group_folders("memory", self._proc / "self" / "cgroup", self._cgroups):
            yield from (folder / name for name in _OF_GROUP)


def is_about_memory(line: str) -> bool:
    """Whether a line of the engine's log complains of too little memory."""
    return bool(_WORDS.search(line))


def died_of_memory(
    code: int, kills: KillCounter, last_words: Iterable[str], *, was_short: bool = False
) -> bool:
    """Whether memory ended a process.

    Args:
        code: What `wait` gave.
        kills: The kernel's counter, read before.
        last_words: The end of its log.
        was_short: Whether memory was seen to be nearly spent just before. Services that end
            processes before the kernel must (systemd-oomd, earlyoom) leave no other trace.
    """
    was_killed = code == -_SIGKILL and (was_short or kills.has_risen())
    return was_killed or (code < 0 and any(map(is_about_memory, last_words)))
