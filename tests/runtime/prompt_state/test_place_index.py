"""Finding archived sequences, against trying each of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorun.runtime.prompt_state import place_index
from nanorun.runtime.prompt_state.archived_state import ArchivedState
from nanorun.runtime.prompt_state.place_index import PlaceIndex
from nanorun.runtime.prompt_state.prefixes import Tokens, n_common, prefix_hashes

token_lists = st.lists(st.integers(0, 2), min_size=1, max_size=12)


def state(tokens: Sequence[int], *checkpoints: int) -> ArchivedState:
    positions = frozenset(p for p in checkpoints if p < len(tokens))
    return ArchivedState(np.array(tokens, np.int32), checkpoint_positions=positions)


states = st.builds(state, token_lists, st.integers(1, 12), st.integers(1, 12))


def farthest(entry: ArchivedState, prompt: Tokens) -> int:
    n = n_common(entry.tokens, prompt)
    return max((p for p in entry.places if p <= min(n, len(prompt) - 1)), default=0)


def longest(index: PlaceIndex, prompt: Tokens) -> tuple[ArchivedState, int] | None:
    return index.longest(prompt, place_index.prefix_hashes(prompt), len(prompt) - 1)


def check_against_trying_all(
    entries: list[ArchivedState], gone: set[int], tokens: list[int], other: ArchivedState
) -> None:
    index = PlaceIndex()
    for entry in entries:
        index.add(entry)
    for i in gone & set(range(len(entries))):
        index.discard(entries[i])
    held = [entry for i, entry in enumerate(entries) if i not in gone]
    assert index.entries == tuple(held)
    prompt = np.array(tokens, np.int32)
    expected = max((farthest(entry, prompt) for entry in held), default=0)
    found = longest(index, prompt)
    assert (found[1] if found else 0) == expected
    if found is not None:
        assert farthest(found[0], prompt) == expected
    assert index.covers(other) == any(entry.makes_useless(other) for entry in held)
    useless = [entry for entry in held if other.makes_useless(entry)]
    assert set(index.covered_by(other)) == set(useless)


@given(st.lists(states, max_size=8), st.sets(st.integers(0, 7)), token_lists, states)
def test_index_finds_what_trying_all_finds(
    entries: list[ArchivedState], gone: set[int], tokens: list[int], other: ArchivedState
) -> None:
    check_against_trying_all(entries, gone, tokens, other)


@given(st.lists(states, max_size=8), st.sets(st.integers(0, 7)), token_lists, states)
def test_hashes_that_agree_by_chance_do_no_harm(
    entries: list[ArchivedState], gone: set[int], tokens: list[int], other: ArchivedState
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place_index, "prefix_hashes", lambda t: np.zeros(len(t), np.uint64))
        check_against_trying_all(entries, gone, tokens, other)


@given(token_lists, token_lists)
def test_common_prefix_is_the_first_difference(a: list[int], b: list[int]) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    found = n_common(np.array(a, np.int32), np.array(b, np.int32))
    assert found == (min(len(a), len(b)) if expected is None else expected)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 575, 576, 577, 4672, 100_000])
def test_common_prefix_is_found_across_chunks(n: int) -> None:
    a = np.arange(100_000, dtype=np.int32)
    b = a.copy()
    b[n:] += 1
    assert n_common(a, b) == n


@given(token_lists, token_lists)
def test_prefixes_have_one_hash_only_if_they_are_equal(a: list[int], b: list[int]) -> None:
    n = min(len(a), len(b))
    hashes = [prefix_hashes(np.array(tokens, np.int32))[:n] for tokens in (a, b)]
    equal = [a[:p] == b[:p] for p in range(1, n + 1)]
    assert (hashes[0] == hashes[1]).tolist() == equal


def test_long_prompts_hash_as_their_beginnings_do() -> None:
    long = np.arange(100_000, dtype=np.int32)
    np.testing.assert_array_equal(prefix_hashes(long)[:5000], prefix_hashes(long[:5000]))


def test_one_of_many_conversations_is_found_by_comparing_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All begin with the same system prompt, as those of one program do."""
    system = list(range(500))
    index = PlaceIndex()
    for i in range(1500):
        index.add(state([*system, *[1000 + i] * 300], 500, 600))
    n_compared: list[int] = []

    def counted(a: Tokens, b: Tokens) -> int:
        n_compared.append(min(len(a), len(b)))
        return n_common(a, b)

    monkeypatch.setattr(place_index, "n_common", counted)
    found = longest(index, np.array([*system, *[1700] * 300, 7], np.int32))
    assert found is not None
    assert (found[0].tokens[-1], found[1]) == (1700, 800)
    assert n_compared == [800]


def test_positions_that_a_file_cannot_mean_are_left_out() -> None:
    index = PlaceIndex()
    tokens = np.array([1, 2, 3], np.int32)
    index.add(ArchivedState(tokens, "disk", frozenset({-1, 0, 2, 9})))
    found = longest(index, np.array([1, 2, 8, 8], np.int32))
    assert found is not None and found[1] == 2
