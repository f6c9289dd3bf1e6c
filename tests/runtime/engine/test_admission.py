"""Whom a waiting prompt waits for, and that waiting costs those that run next to nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from nanorun.runtime.engine import admission
from nanorun.runtime.engine.admission import Admission
from nanorun.runtime.prompt_state import branch as branch_module
from nanorun.runtime.prompt_state import prefix_tree
from nanorun.runtime.prompt_state.archive import Archive
from nanorun.runtime.prompt_state.prefix_tree import PrefixTree
from nanorun.runtime.prompt_state.prefixes import Tokens, n_common, prefix_hashes

COMMON = list(range(200))


class NoMemory:
    """A context that nobody asks for logits."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: b"state"


@dataclass(eq=False)
class FakeStream:
    prompt: Tokens
    n_evaluated: int = 0
    request: Any = None
    branch: Any = None
    pending: int | None = None

    def __post_init__(self) -> None:
        self.drafts: list[int] = []
        self.stops: set[int] = set()
        self.turn = (False, False, 0)

    @property
    def in_prefill(self) -> bool:
        return self.n_evaluated < len(self.prompt)


def stream(tokens: list[int], n_evaluated: int = 0) -> FakeStream:
    return FakeStream(np.array(tokens, np.int32), n_evaluated)


def make_admission(n_cells: int = 1000) -> tuple[Admission[FakeStream], PrefixTree]:
    tree = PrefixTree(NoMemory(), 8, n_cells, Archive(0))
    return Admission(tree), tree


def hold(tree: PrefixTree, tokens: list[int]) -> Any:
    """A running sequence of these tokens."""
    branch = tree.acquire(tree.best_match(np.array(tokens, np.int32)))
    assert branch is not None
    tree.extend(branch, tokens[branch.n_tokens :])
    return branch


def test_leader_is_the_prefill_that_will_share_most() -> None:
    waits, _ = make_admission()
    running = [stream([*COMMON[:100], 999], 10), stream([*COMMON, 998], 20), stream(COMMON, 200)]
    assert waits.leader(stream([*COMMON, 1]), running) == (running[1], 200)


def test_nobody_is_waited_for_when_little_is_shared() -> None:
    waits, _ = make_admission()
    assert waits.leader(stream([1, 2, 3, 4]), [stream([1, 2, 3, 9])]) is None


def test_nobody_is_waited_for_when_the_prefix_is_cached_already() -> None:
    waits, tree = make_admission()
    hold(tree, COMMON[:190])
    assert waits.leader(stream([*COMMON, 1]), [stream([*COMMON, 2], 10)]) is None


def test_nobody_is_waited_for_that_is_past_the_fork() -> None:
    waits, _ = make_admission()
    assert waits.leader(stream([*COMMON, 1]), [stream([*COMMON, 2, 3], 201)]) is None


def test_one_token_of_the_prompt_is_left_to_read() -> None:
    waits, _ = make_admission()
    leader = stream([*COMMON, 2, 3], 10)
    assert waits.leader(stream(COMMON), [leader]) == (leader, 199)


def test_leader_is_compared_anew_when_its_prompt_became_longer() -> None:
    waits, _ = make_admission()
    leader, waiting = stream(COMMON[:100], 10), stream([*COMMON, 1])
    assert waits.leader(waiting, [leader]) == (leader, 100)
    leader.prompt = np.array([*COMMON, 7], np.int32)  # suspended, and gone on
    assert waits.leader(waiting, [leader]) == (leader, 200)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each comparison and each hashing from now on."""
    counts: list[int] = []

    def counted(a: Tokens, b: Tokens) -> int:
        counts.append(min(len(a), len(b)))
        return n_common(a, b)

    def hashed(tokens: Tokens) -> Any:
        counts.append(len(tokens))
        return prefix_hashes(tokens)

    monkeypatch.setattr(admission, "n_common", counted)
    monkeypatch.setattr(branch_module, "n_common", counted)
    monkeypatch.setattr(prefix_tree, "prefix_hashes", hashed)
    return counts


def test_waiting_costs_no_comparison_a_step(compared: list[int]) -> None:
    waits, tree = make_admission(n_cells=10**6)
    long = list(range(10_000))
    branches = [hold(tree, [i, *long[:100]]) for i in range(3)]
    running = [stream([*long, i], 100) for i in range(3)]
    waiting = [stream([*long, 100 + i]) for i in range(32)]
    compared.clear()
    for _ in range(50):  # steps in which the running sequences grow
        for one in waiting:
            leader = waits.leader(one, running)
            assert leader is not None and leader[1] == 10_000
            assert tree.n_cells_needed(waits.match(one)) == 10_001
        for branch in branches:
            tree.extend(branch, [7])
    # Once with each sequence held and each prompt being read, and one hashing each.
    assert len(compared) == 32 * (3 + 3 + 1)


def test_change_of_the_tree_costs_comparing_what_is_new(compared: list[int]) -> None:
    waits, tree = make_admission(n_cells=10**6)
    branches = [hold(tree, [i, *range(100)]) for i in range(3)]
    waiting = stream(list(range(1, 10_000)))
    waits.match(waiting)
    compared.clear()
    tree.checkpoint(branches[0])
    for _ in range(10):
        waits.match(waiting)
    assert not compared  # none of them has grown
    same = hold(tree, list(range(1, 300)))
    assert waits.match(waiting).n_tokens == 299
    compared.clear()
    tree.extend(same, list(range(300, 310)))
    tree.checkpoint(branches[0])
    assert waits.match(waiting).n_tokens == 309
    assert compared == [10]
    tree.release(same, keep=False)
    compared.clear()
    waits.forget(waiting)
    compared.clear()
    waits.match(waiting)
    assert len(compared) == 3 + 1
