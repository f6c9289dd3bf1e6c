"""What waiting prompts cost the streams that run: seconds a step, without a model.

    python bench/admission.py

Three running sequences of 100,000 tokens grow by a token a step; prompts that share all of these
wait, for one of them to read more or for room. Then the look-up of one prompt among 1,500 saved
conversations of 2,000 tokens that begin with the same 1,000.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanorun.runtime.engine.admission import Admission
from nanorun.runtime.engine.waiting import Waiting
from nanorun.runtime.prompt_state.archive import Archive
from nanorun.runtime.prompt_state.archived_state import ArchivedState
from nanorun.runtime.prompt_state.place_index import PlaceIndex
from nanorun.runtime.prompt_state.prefix_tree import PrefixTree
from nanorun.runtime.prompt_state.prefixes import Tokens, prefix_hashes

N_PROMPT, N_RUNNING, N_SAVED = 100_000, 3, 1500


class NoMemory:
    """Stands in for a context: everything succeeds."""

    def __getattr__(self, name: str) -> Callable[..., bytes]:
        return lambda *args: b""


@dataclass(eq=False)
class Stream:
    """What admission reads of a stream."""

    prompt: Tokens
    n_evaluated: int = 0
    in_prefill: bool = True
    is_read_only: bool = False
    branch: Any = None
    pending: int | None = None
    turn: tuple[bool, bool, int] = (False, False, 0)
    drafts: list[int] = field(default_factory=list)
    pauses: set[int] = field(default_factory=set)


def seconds_a_step(n_waiting: int, n_steps: int, *, changes: bool) -> list[float]:
    """Time that admission takes in each step; the first looks everything up.

    Args:
        n_waiting: Prompts that wait.
        n_steps: Steps.
        changes: Whether the tree changes before each step, as when a checkpoint is saved.
    """
    tree = PrefixTree(NoMemory(), 16, 10**7, Archive(0))
    admission: Admission[Stream] = Admission(tree)
    shared = np.arange(N_PROMPT, dtype=np.int32)
    running, branches = [], []
    for i in range(N_RUNNING):
        running.append(Stream(np.append(shared, np.arange(i, i + 500, dtype=np.int32)), N_PROMPT))
        branch = tree.acquire(tree.best_match(np.array([i], np.int32)))
        assert branch is not None
        tree.extend(branch, shared)
        branches.append(branch)
    waiting: Waiting[Stream] = Waiting()
    for i in range(n_waiting):
        waiting.add(Stream(np.append(shared, np.int32(i)), turn=(False, False, i)))
    times = []
    for _ in range(n_steps):
        for branch in branches:
            tree.extend(branch, [1])
        if changes:
            tree.checkpoint(branches[0])
        started = time.perf_counter()
        for stream in waiting.head():
            admission.leader(stream, running)
            tree.n_cells_needed(admission.match(stream))
            tree.n_cells_obtainable()
        times.append(time.perf_counter() - started)
    return times


def seconds_a_look_up() -> float:
    """Median time to hash a prompt and find it among the saved conversations."""
    rng = np.random.default_rng(0)
    index, system = PlaceIndex(), np.arange(1000, dtype=np.int32)
    for _ in range(N_SAVED):
        tail = rng.integers(0, 1000, 1000).astype(np.int32)
        checkpoints = frozenset({1000, 1200, 1500, 1900})
        index.add(ArchivedState(np.append(system, tail), "disk", checkpoints))
    times = []
    for entry in index.entries[:200]:
        prompt = np.append(entry.tokens, np.int32(1))
        started = time.perf_counter()
        found = index.longest(prompt, prefix_hashes(prompt), len(prompt) - 1)
        times.append(time.perf_counter() - started)
        assert found is not None and found[1] == 2000
    return statistics.median(times)


def main() -> None:
    """Print a row a case."""
    print("| waiting prompts of 100,000 tokens | first step, ms | later, ms | tree changes, ms |")
    print("|---|---|---|---|")
    for n_waiting in (1, 8, 32, 256, 512):
        first, *later = seconds_a_step(n_waiting, 50, changes=False)
        _, *changed = seconds_a_step(n_waiting, 20, changes=True)
        row = (first, statistics.median(later), statistics.median(changed))
        print(f"| {n_waiting} | " + " | ".join(f"{1e3 * s:.3f}" for s in row) + " |")
    print(f"\none prompt among {N_SAVED} saved conversations: {1e3 * seconds_a_look_up():.3f} ms")


if __name__ == "__main__":
    main()
