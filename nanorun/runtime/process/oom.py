"""Was it memory? What the kernel and the engine's last words say about a process that ended."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_SIGKILL = 9
# Linux counts the processes that it ended for want of memory, for the whole machine and for each
# control group (Documentation/admin-guide/cgroup-v2.rst, memory.events).
_COUNTERS = (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events"))
_OOM_KILLS = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
# ggml and CUDA say one of these before they abort.
_WORDS = re.compile(
    r"out of memory|failed to allocate|unable to allocate|cudaMalloc failed|bad_alloc",
    re.IGNORECASE,
)


def count_oom_kills() -> int:
    """Processes that the kernel has ended for want of memory so far; 0 where it does not say."""
    total = 0
    for path in _COUNTERS:
        try:
            total += sum(map(int, _OOM_KILLS.findall(path.read_text())))
        except OSError:
            continue
    return total


def is_about_memory(line: str) -> bool:
    """Whether a line of the engine's log complains of too little memory."""
    return bool(_WORDS.search(line))


def died_of_memory(code: int, n_kills_before: int, last_words: Iterable[str]) -> bool:
    """Whether memory ended a process.

    Args:
        code: What `wait` gave.
        n_kills_before: `count_oom_kills` when the process was started.
        last_words: The end of its log.
    """
    killed_by_kernel = code == -_SIGKILL and count_oom_kills() > n_kills_before
    return killed_by_kernel or (code < 0 and any(map(is_about_memory, last_words)))
