"""The prefix tree against a memory that behaves like llama.cpp's hybrid one, and no better."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nanorun.errors import EngineError
from nanorun.runtime.prompt_state.archive import Archive
from nanorun.runtime.prompt_state.branch import Branch
from nanorun.runtime.prompt_state.prefix_tree import PrefixTree
from nanorun.runtime.prompt_state.prefixes import Tokens

N_SEQ, N_CELLS = 4, 96


class HybridMemory:
    """Sequences as pairs (attention tokens, tokens the recurrent state has seen).

    A sequence is sound while both agree; `tokens` says so. Cells are counted as llama.cpp does:
    a forked sequence shares the cells of its source. After a guess that was taken back the
    recurrent state only points at the right one: nothing can be copied of it before `settle` or
    the next evaluation (docs/engine-hazards.md).
    """

    def __init__(self) -> None:
        self.attention: dict[int, list[object]] = {}
        self.recurrent: dict[int, list[int]] = {}
        self.rolled_back: set[int] = set()
        self._n_cells_made = 0

    def evaluate(self, seq_id: int, tokens: list[int]) -> None:
        if tokens:
            self.rolled_back.discard(seq_id)
        cells = self.attention.setdefault(seq_id, [])
        seen = self.recurrent.setdefault(seq_id, [])
        for token in tokens:
            self._n_cells_made += 1
            cells.append((token, self._n_cells_made))
            seen.append(token)

    def n_cells(self) -> int:
        return len({cell for cells in self.attention.values() for cell in cells})

    def tokens(self, seq_id: int) -> list[int]:
        tokens = [token for token, _ in self.attention.get(seq_id, [])]
        assert self.recurrent.get(seq_id, []) == tokens, "attention and recurrent state differ"
        return tokens

    def evaluate_and_take_back(self, seq_id: int, tokens: list[int]) -> None:
        """Evaluate tokens, and a guess after them that turns out wrong."""
        self.evaluate(seq_id, tokens)
        self.rolled_back.add(seq_id)

    def settle(self, seq_id: int) -> None:
        self.rolled_back.discard(seq_id)

    def _check_settled(self, seq_id: int) -> None:
        assert seq_id not in self.rolled_back, "the state that would be copied is another one"

    def drop(self, seq_id: int) -> None:
        self.attention.pop(seq_id, None)
        self.recurrent.pop(seq_id, None)
        self.rolled_back.discard(seq_id)

    def fork(self, source: int, target: int) -> None:
        self._check_settled(source)
        assert not self.attention.get(target), "a fork needs an empty target"
        self.attention[target] = list(self.attention[source])
        self.recurrent[target] = list(self.recurrent[source])

    def fork_at(self, source: int, target: int, n_tokens: int, state: bytes) -> None:
        self._check_settled(source)
        assert not self.attention.get(target), "a fork needs an empty target"
        self.attention[target] = self.attention[source][:n_tokens]
        self.recurrent[target] = json.loads(state)

    def rewind(self, seq_id: int, n_tokens: int, state: bytes) -> None:
        self.attention[seq_id] = self.attention[seq_id][:n_tokens]
        self.recurrent[seq_id] = json.loads(state)
        self.rolled_back.discard(seq_id)

    def recurrent_state(self, seq_id: int) -> bytes:
        self._check_settled(seq_id)
        return json.dumps(self.recurrent[seq_id]).encode()

    def full_state(self, seq_id: int) -> bytes:
        self._check_settled(seq_id)
        return json.dumps(self.tokens(seq_id)).encode()

    def restore(self, seq_id: int, state: bytes) -> None:
        assert not self.attention.get(seq_id), "a restore needs an empty target"
        self.evaluate(seq_id, json.loads(state))


def make_tree(
    archive_bytes: int = 4000, checkpoint_bytes: int = 2000
) -> tuple[PrefixTree, HybridMemory]:
    memory = HybridMemory()
    return PrefixTree(memory, N_SEQ, N_CELLS, Archive(archive_bytes), checkpoint_bytes), memory


def prompt_of(tokens: Sequence[int]) -> Tokens:
    return np.array(tokens, np.int32)


def start(tree: PrefixTree, prompt: Sequence[int]) -> Branch | None:
    return tree.acquire(tree.best_match(prompt_of(prompt)))


def read(tree: PrefixTree, memory: HybridMemory, prompt: list[int], stops: tuple[int, ...] = ()):  # type: ignore[no-untyped-def]
    branch = start(tree, prompt)
    assert branch is not None
    for end in sorted({*(s for s in stops if s > branch.n_tokens), len(prompt)}):
        piece = prompt[branch.n_tokens : end]
        assert tree.make_room(len(piece))
        memory.evaluate(branch.seq_id, piece)
        tree.extend(branch, piece)
        if end in stops:
            tree.checkpoint(branch)
    return branch


def test_acquire_continues_an_idle_sequence() -> None:
    tree, memory = make_tree()
    first = read(tree, memory, [1, 2, 3])
    tree.release(first)
    again = start(tree, [1, 2, 3, 4])
    assert again is first
    assert again.n_cached == 3


def test_acquire_leaves_the_last_token_to_evaluate() -> None:
    tree, memory = make_tree()
    tree.release(read(tree, memory, [1, 2, 3]))
    branch = start(tree, [1, 2, 3])
    assert branch is not None
    assert branch.n_cached == 0  # no state exists before the last token


def test_acquire_forks_at_a_checkpoint_of_a_busy_sequence() -> None:
    tree, memory = make_tree()
    first = read(tree, memory, [1, 2, 3, 4, 5], stops=(3,))
    second = start(tree, [1, 2, 3, 9])
    assert second is not None and second is not first
    assert second.n_cached == 3
    assert memory.tokens(second.seq_id) == [1, 2, 3]
    assert tree.n_cells_used == memory.n_cells() == 5


def test_acquire_without_a_state_reads_anew() -> None:
    tree, memory = make_tree()
    read(tree, memory, [1, 2, 3, 4, 5])
    second = start(tree, [1, 2, 3, 9])
    assert second is not None
    assert second.n_cached == 0


def test_acquire_returns_none_while_all_sequences_are_busy() -> None:
    tree, memory = make_tree()
    for i in range(N_SEQ):
        read(tree, memory, [i, i])
    assert start(tree, [7]) is None


def test_eviction_spills_to_the_archive_and_comes_back() -> None:
    tree, memory = make_tree()
    tree.release(read(tree, memory, list(range(40)), stops=(20,)))
    assert tree.make_room(N_CELLS)
    assert tree.n_cells_used == memory.n_cells() == 0
    branch = start(tree, [*range(20), 99, 98])
    assert branch is not None
    assert (branch.n_cached, branch.cached_from) == (20, "host")
    assert memory.tokens(branch.seq_id) == list(range(20))


def test_make_room_never_takes_a_busy_sequence() -> None:
    tree, memory = make_tree()
    read(tree, memory, list(range(50)))
    assert not tree.make_room(N_CELLS)
    assert tree.n_cells_obtainable() == N_CELLS - 50


def test_checkpoints_stay_within_their_budget() -> None:
    tree, memory = make_tree(checkpoint_bytes=200)
    for i in range(3):
        branch = read(tree, memory, [i, *range(30)], stops=(10, 20))
        tree.release(branch)
        assert tree.checkpoint_bytes <= 200


def test_checkpoint_of_a_prefix_goes_last() -> None:
    tree, memory = make_tree(checkpoint_bytes=200)
    branch = read(tree, memory, list(range(40)), stops=(10, 20, 30))
    tree.release(branch)
    tree, memory = make_tree(checkpoint_bytes=200)
    branch = start(tree, list(range(40)))
    assert branch is not None
    for end in (10, 20, 30, 35):
        piece = list(range(branch.n_tokens, end))
        memory.evaluate(branch.seq_id, piece)
        tree.extend(branch, piece)
        tree.checkpoint(branch)
        if end == 10:
            tree.keep_prefix(branch, end)
    assert tree.checkpoint_bytes <= 200
    assert 10 in branch.checkpoints
    assert 20 not in branch.checkpoints


def test_sequence_that_was_cut_is_compared_anew() -> None:
    tree, memory = make_tree()
    branch = read(tree, memory, [1, 2, 3, 4, 5, 6], stops=(2,))
    prompt = prompt_of([1, 2, 3, 4, 5, 6, 7])
    known = tree.best_match(prompt)
    assert (known.n_tokens, known.n_common) == (6, 6)
    assert tree.cut_to_checkpoint(branch)
    memory.evaluate(branch.seq_id, [3, 9, 9, 9])
    tree.extend(branch, [3, 9, 9, 9])
    tree.release(branch)
    found = tree.best_match(prompt, known)
    assert (found.n_tokens, found.n_common) == (2, 3)


def test_sequence_on_the_device_is_said_to_come_from_there() -> None:
    tree, memory = make_tree()
    tree.release(read(tree, memory, list(range(40))))
    assert tree.make_room(N_CELLS)
    branch = start(tree, [*range(40), 50])
    assert branch is not None and branch.cached_from == "host"
    tree.release(branch)
    again = start(tree, [*range(40), 60])
    assert again is branch
    assert (again.n_cached, again.cached_from) == (40, "device")


def test_eviction_keeps_the_checkpoints_that_no_other_sequence_has() -> None:
    tree, memory = make_tree()
    first = read(tree, memory, list(range(30)), stops=(10, 20))
    tree.release(first)
    second = start(tree, [*range(30), 50])
    assert second is first
    tree.checkpoint(second)
    third = start(tree, [*range(30), 60])
    assert third is not None and third is not second
    third.checkpoints = {30: third.checkpoints[30]}  # the others gave way to a budget
    tree.release(second)
    tree.make_room(tree.n_cells_free + 1)
    tree.make_room(N_CELLS)
    tree.release(third, keep=False)
    branch = start(tree, [*range(20), 70])
    assert branch is not None
    assert (branch.n_cached, branch.cached_from) == (20, "host")


def test_recall_is_not_pushed_out_by_what_has_to_make_room_for_it() -> None:
    tree, memory = make_tree(archive_bytes=200)  # holds one of the sequences
    wanted = list(range(40))
    tree.release(read(tree, memory, wanted))
    assert tree.make_room(N_CELLS)
    for i in range(N_SEQ):
        tree.release(read(tree, memory, [100 + i] * 20))
    branch = start(tree, [*wanted, 50])
    assert branch is not None
    assert (branch.n_cached, branch.cached_from) == (40, "host")


def test_recalled_checkpoints_stay_within_their_budget() -> None:
    tree, memory = make_tree(archive_bytes=4000, checkpoint_bytes=200)
    for i in range(2):
        tree.release(read(tree, memory, [50 + i, *range(30)], stops=(10, 20)))
        tree.make_room(N_CELLS)
    for i in range(2):
        branch = start(tree, [50 + i, *range(30), 99])
        assert branch is not None and branch.cached_from == "host"
        assert tree.checkpoint_bytes <= 200


def hold_much() -> tuple[PrefixTree, HybridMemory]:
    """Two sequences in the archive, the first one older, and one with checkpoints beside them."""
    tree, memory = make_tree()
    for first in (50, 60):
        tree.release(read(tree, memory, [first, *range(39)]))
        assert tree.make_room(N_CELLS)
    tree.release(read(tree, memory, list(range(70, 90)), stops=(5, 10)))
    assert tree.checkpoint_bytes and tree.archive_bytes
    return tree, memory


def test_oldest_archived_sequence_is_given_back_first() -> None:
    tree, _ = hold_much()
    n_checkpoints = tree.checkpoint_bytes
    tree.limit_spare(tree.spare_bytes - 1)
    assert tree.checkpoint_bytes == n_checkpoints
    assert 0 < tree.archive_bytes < tree.spare_limit_bytes
    newer = start(tree, [60, *range(39), 7])
    assert newer is not None and (newer.n_cached, newer.cached_from) == (40, "host")
    older = start(tree, [50, *range(39), 7])
    assert older is not None and older.n_cached == 0


def test_checkpoints_are_given_back_once_nothing_is_archived() -> None:
    tree, memory = hold_much()
    tree.limit_spare(tree.checkpoint_bytes - 1)
    assert tree.archive_bytes == 0
    assert 0 < tree.checkpoint_bytes <= tree.spare_limit_bytes
    tree.limit_spare(-5)
    assert tree.spare_bytes == tree.spare_limit_bytes == 0
    branch = read(tree, memory, [*range(70, 90), 1, 2], stops=(21,))
    assert branch.n_cached == 20  # what is on the device stays
    assert not branch.checkpoints
    tree.release(branch)
    assert tree.make_room(N_CELLS)
    assert tree.spare_bytes == 0


def test_more_is_held_again_once_it_may_be_and_never_more_than_planned() -> None:
    tree, memory = hold_much()
    tree.limit_spare(0)
    tree.limit_spare(10**9)
    assert tree.spare_limit_bytes == tree.planned_spare_bytes == 6000
    tree.release(read(tree, memory, [50, *range(39)], stops=(20,)))
    assert tree.checkpoint_bytes > 0
    assert tree.make_room(N_CELLS)
    assert tree.archive_bytes > 0


class Refusing(HybridMemory):
    """An engine that does not take a saved state."""

    def restore(self, seq_id: int, state: bytes) -> None:
        self.evaluate(seq_id, [1])  # some of it went in
        raise EngineError("a saved state does not fit")


def test_state_that_the_engine_refuses_is_read_anew() -> None:
    memory = Refusing()
    tree = PrefixTree(memory, N_SEQ, N_CELLS, Archive(4000))
    tree.release(read(tree, memory, list(range(40))))
    assert tree.make_room(N_CELLS)
    branch = start(tree, [*range(40), 50])
    assert branch is not None
    assert branch.n_cached == tree.n_cells_used == memory.n_cells() == 0


def test_long_conversation_is_kept_before_short_ones_and_not_for_ever() -> None:
    tree, memory = make_tree()
    long = read(tree, memory, list(range(40)))
    tree.release(long)
    for i in range(5):
        tree.release(read(tree, memory, [100 + i] * 3))
    assert long in tree.branches
    for i in range(100):
        tree.release(read(tree, memory, [200 + i] * 3))
    assert long not in tree.branches
    branch = start(tree, [*range(40), 50])
    assert branch is not None
    assert (branch.n_cached, branch.cached_from) == (40, "host")


def test_match_is_found_again_only_after_a_change() -> None:
    tree, memory = make_tree()
    first = read(tree, memory, [1, 2, 3, 4], stops=(2,))
    prompt = prompt_of([1, 2, 3, 9])
    match = tree.best_match(prompt)
    assert match.n_tokens == 2
    memory.evaluate(first.seq_id, [5])
    tree.extend(first, [5])
    assert tree.best_match(prompt, match) is match
    tree.checkpoint(first)
    assert tree.best_match(prompt, match) is not match
    assert tree.best_match(prompt_of([7, 8]), match).n_tokens == 0


def test_match_that_a_running_sequence_grew_past_is_not_used() -> None:
    tree, memory = make_tree()
    first = read(tree, memory, [1, 2, 3])
    prompt = prompt_of([1, 2, 3, 4, 9])
    match = tree.best_match(prompt)
    assert match.n_tokens == 3  # the end, for now
    memory.evaluate(first.seq_id, [4, 5])
    tree.extend(first, [4, 5])
    branch = tree.acquire(match)
    assert branch is not None
    assert branch.n_cached == 0
    assert memory.tokens(branch.seq_id) == []


def test_match_is_not_used_while_a_rollback_is_pending() -> None:
    tree, memory = make_tree()
    first = read(tree, memory, [1, 2, 3], stops=(2,))
    match = tree.best_match(prompt_of([1, 2, 9]))
    tree.extend(first, [], settled=False)
    branch = tree.acquire(match)
    assert branch is not None
    assert branch.n_cached == 0


def test_sequence_whose_last_guess_was_wrong_is_reused_once_it_is_released() -> None:
    tree, memory = make_tree()
    first = read(tree, memory, [1, 2, 3])
    memory.evaluate_and_take_back(first.seq_id, [4])
    tree.extend(first, [4], settled=False)
    tree.release(first)
    again = start(tree, [1, 2, 3, 4, 5])
    assert again is first
    assert again.n_cached == 4
    assert first.seq_id not in memory.rolled_back


def test_sequence_too_large_to_come_back_leaves_the_place_to_one_on_the_device() -> None:
    tree, memory = make_tree()
    long = list(range(60))
    tree.release(read(tree, memory, long, stops=(50,)))
    assert tree.make_room(N_CELLS)
    read(tree, memory, [*long[:40], 98, 99], stops=(40,))  # from the beginning: it holds no state
    branch = start(tree, [*long[:50], 97])
    assert branch is not None
    assert (branch.n_cached, branch.cached_from) == (40, "device")


def test_prompt_needs_only_the_cells_that_no_running_sequence_holds() -> None:
    tree, memory = make_tree()
    first = read(tree, memory, [1, 2, 3, 4, 5], stops=(3,))
    prompt = prompt_of([1, 2, 3, 9])
    assert tree.n_cells_needed(tree.best_match(prompt)) == 1
    tree.release(first)
    assert tree.n_cells_needed(tree.best_match(prompt)) == 4
    assert tree.n_cells_needed(tree.best_match(prompt_of([8, 8]))) == 2


class TreeMachine(RuleBasedStateMachine):
    """Any order of prompts, growth, release and eviction keeps tree and memory in agreement."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.archive = HybridMemory(), Archive(4000)
        self.tree = PrefixTree(self.memory, N_SEQ, N_CELLS, self.archive, 2000)
        self.busy: list = []  # type: ignore[type-arg]

    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=24)

    @rule(prompt=tokens, stops=st.sets(st.integers(1, 24), max_size=3))
    def begin(self, prompt: list[int], stops: set[int]) -> None:
        expected = self.n_reusable(prompt)
        branch = start(self.tree, prompt)
        if branch is None:
            assert len(self.busy) == N_SEQ
            return
        assert branch.n_cached == expected < len(prompt)
        assert self.memory.tokens(branch.seq_id) == prompt[: branch.n_cached]
        self.busy.append(branch)
        for end in sorted({*(s for s in stops if s < len(prompt)), len(prompt)}):
            self.grow(branch, prompt[branch.n_tokens : end])
            if branch.n_tokens == end and end in stops:
                self.tree.checkpoint(branch)

    def n_reusable(self, prompt: list[int]) -> int:
        """The most tokens that can be had for nothing, found by trying every place."""

        def best(tokens: Sequence[int], checkpoints: Iterable[int]) -> int:
            places = [p for p in (*checkpoints, len(tokens)) if p < len(prompt)]
            return max((p for p in places if list(tokens[:p]) == prompt[:p]), default=0)

        pending = self.memory.rolled_back
        sound = [b for b in self.tree.branches if b.seq_id not in pending]
        on_device = [best(b.tokens, b.checkpoints) for b in sound]
        n_device = max(on_device, default=0)
        archived = [
            (best(e.tokens, e.checkpoint_positions), -e.n_tokens) for e in self.archive.entries
        ]
        n_archived, n_cells = max(archived, default=(0, 0))
        comes_back = n_archived > n_device and -n_cells <= self.tree.n_cells_obtainable()
        return n_archived if comes_back else n_device

    def grow(self, branch, piece: list[int]) -> None:  # type: ignore[no-untyped-def]
        if piece and self.tree.make_room(len(piece)):
            self.memory.evaluate(branch.seq_id, piece)
            self.tree.extend(branch, piece)

    @precondition(lambda self: self.busy)
    @rule(data=st.data(), piece=tokens)
    def answer(self, data: st.DataObject, piece: list[int]) -> None:
        self.grow(data.draw(st.sampled_from(self.busy)), piece)

    @precondition(lambda self: self.busy)
    @rule(data=st.data(), piece=tokens)
    def answer_after_a_wrong_guess(self, data: st.DataObject, piece: list[int]) -> None:
        branch = data.draw(st.sampled_from(self.busy))
        if self.tree.make_room(len(piece)):
            self.memory.evaluate_and_take_back(branch.seq_id, piece)
            self.tree.extend(branch, piece, settled=False)

    @precondition(lambda self: self.busy)
    @rule(data=st.data(), keep=st.booleans())
    def release(self, data: st.DataObject, keep: bool) -> None:
        branch = data.draw(st.sampled_from(self.busy))
        self.busy.remove(branch)
        self.tree.release(branch, keep=keep)

    @rule(n_cells=st.integers(0, N_CELLS))
    def make_room(self, n_cells: int) -> None:
        obtainable = self.tree.n_cells_obtainable()
        assert self.tree.make_room(n_cells) == (obtainable >= n_cells)

    @rule()
    def evict_idle(self) -> None:
        self.tree.make_room(N_CELLS)

    @rule(n_bytes=st.integers(0, 7000))
    def limit_spare(self, n_bytes: int) -> None:
        self.tree.limit_spare(n_bytes)

    @invariant()
    def stays_within_what_may_be_held(self) -> None:
        assert self.tree.spare_bytes <= self.tree.spare_limit_bytes <= 6000

    @invariant()
    def is_settled_once_idle(self) -> None:
        assert self.memory.rolled_back <= {branch.seq_id for branch in self.busy}

    @invariant()
    def agrees(self) -> None:
        for branch in self.tree.branches:
            assert self.memory.tokens(branch.seq_id) == list(branch.tokens)
            for position, state in branch.checkpoints.items():
                assert json.loads(state) == list(branch.tokens[:position])
        assert self.tree.n_cells_used == self.memory.n_cells() <= N_CELLS


TestTreeMachine = pytest.mark.filterwarnings("default")(TreeMachine.TestCase)
TreeMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=25, deadline=None)
