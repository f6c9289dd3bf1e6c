"""Too little main memory to load the model just now, in words."""

from __future__ import annotations

from contextlib import suppress

from nanorun.errors import MemoryShortage
from nanorun.model.main_memory import MainMemory
from nanorun.model.memory_needs import MemoryNeeds
from nanorun.model.units import MIB, format_gib

_N_SHOWN = 3
# Others may give memory back at any time; to ask costs some milliseconds.
_RETRY_AFTER_S = 10.0
_LEAST_CUSHION = 256 * MIB


def headline(need: int, memory: MainMemory, needs: MemoryNeeds) -> str:
    """What is needed, and what there is, on one line."""
    return (
        f"the model needs {format_gib(need)} of main memory,"
        f" but {format_gib(memory.available_bytes)} are free,"
        f" of which {format_gib(needs.leave_bytes)} are to be left to other programs"
    )


def shortage(need: int, memory: MainMemory, needs: MemoryNeeds) -> MemoryShortage:
    """The error of a model that is not loaded, since it would not fit.

    Args:
        need: Bytes of the smallest way to open it.
        memory: What there is.
        needs: What was planned.
    """
    facts = []
    if needs.weights_bytes > memory.available_bytes:
        facts.append(f"its weights alone take {format_gib(needs.weights_bytes)}")
    if memory.limit:
        facts.append(memory.limit)
    holders = largest_processes()
    if holders:
        facts.append(f"most is held by {', '.join(holders)}")
    facts.append("it is tried again with the next request")
    # A new plan wants room for some saved prompts as well.
    cushion = (memory.available_bytes - need) // 2
    tries = []
    if needs.again and _LEAST_CUSHION <= cushion < needs.leave_bytes:
        tries.append(f"{needs.again} --leave {cushion // MIB}M")
    return MemoryShortage(
        headline(need, memory, needs), facts=facts, tries=tries, retry_after_s=_RETRY_AFTER_S
    )


def ran_out_repeatedly(n_times: int, wait_s: float) -> MemoryShortage:
    """The error of a model that is not loaded again yet, since that has failed before."""
    return MemoryShortage(
        f"memory ran out {n_times} times one after the other: the model is not loaded again yet",
        facts=[f"the next try may be made in {wait_s:.0f} s"],
        retry_after_s=wait_s,
    )


def nearly_spent(free_bytes: int, n_chars: int) -> MemoryShortage:
    """The error of a long prompt that is not read, since memory is all but spent."""
    return MemoryShortage(
        f"memory is nearly spent ({format_gib(free_bytes)} left), so a prompt of {n_chars:,}"
        " characters is not read now",
        facts=[f"most is held by {', '.join(holders)}"] if (holders := largest_processes()) else [],
        retry_after_s=_RETRY_AFTER_S,
    )


def largest_processes(n_shown: int = _N_SHOWN) -> list[str]:
    """The processes that hold most of main memory, where this one may ask: `name (pid) 9.1 GiB`."""
    import psutil

    sizes: list[tuple[int, str]] = []
    with suppress(psutil.Error, OSError):
        for process in psutil.process_iter(["pid", "name", "memory_info"]):
            held = process.info["memory_info"]
            if held is not None:  # of another user
                name = process.info["name"] or "?"
                sizes.append((int(held.rss), f"{name} ({process.info['pid']})"))
    sizes.sort(reverse=True)
    return [f"{name} {format_gib(n_bytes)}" for n_bytes, name in sizes[:n_shown]]
