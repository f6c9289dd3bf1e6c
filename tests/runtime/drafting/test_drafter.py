"""Guessing ahead changes the speed of a reply and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorun.errors import UsageError
from nanorun.runtime.drafting.drafter import next_draft_length
from nanorun.runtime.drafting.lookup import look_up
from tests.runtime.harness import SMALL, Rig


def array(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def test_look_up_finds_what_followed_before() -> None:
    assert look_up(array(1, 2, 3, 4, 5, 9, 1, 2, 3), 2) == [4, 5]


def test_look_up_prefers_the_longest_and_latest_match() -> None:
    assert look_up(array(0, 1, 2, 3, 4, 1, 2, 3, 5, 0, 1, 2, 3), 1) == [4]
    assert look_up(array(1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2, 3), 1) == [5]


def test_look_up_has_no_idea_without_a_match() -> None:
    assert look_up(array(1, 2, 3, 4), 3) == []
    assert look_up(array(2, 3, 9, 2, 3), 3) == []  # two tokens are too common to mean anything
    assert look_up(array(1), 3) == []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 5))
def test_look_up_only_says_what_was_said(tokens: list[int], n_most: int) -> None:
    found = look_up(np.array(tokens, np.int32), n_most)
    assert len(found) <= n_most
    text = "".join(map(str, tokens))
    assert text[-3:] + "".join(map(str, found)) in text or not found


def test_draft_length_grows_with_hits_and_shrinks_with_misses() -> None:
    assert next_draft_length(2, 2, 4) == 3
    assert next_draft_length(4, 4, 4) == 4
    assert next_draft_length(4, 1, 4) == 1
    assert next_draft_length(4, 0, 4) == 1


def replies(rig: Rig, n_tokens: int = 60) -> list[list[int]]:
    """Several streams at once, with prompts that repeat themselves."""
    prompts = [[32 + (i * k) % 40 for i in range(50)] for k in (1, 3, 7)]
    ids = [rig.submit(prompt, n_tokens=n_tokens) for prompt in prompts]
    rig.run()
    for request_id in ids:
        rig.check(request_id)
    return [rig.said(request_id) for request_id in ids]


@pytest.mark.parametrize("n_draft", [1, 3, 8])
def test_lookup_says_what_plain_decoding_says(pico_f32_gguf: Path, n_draft: int) -> None:
    plain, guessing = (
        Rig(pico_f32_gguf, replace(SMALL, speculation=speculation, n_draft=n_draft))
        for speculation in ("off", "lookup")
    )
    assert replies(plain) == replies(guessing)
    accepted = [f.usage.accepted_tokens for f in guessing.finished.values()]  # type: ignore[union-attr]
    assert sum(accepted) > 10
    reply = guessing.replies["t0"]
    assert len(reply.logits) == len(reply.tokens)  # every token was picked by the model
    plain.close()
    guessing.close()


@pytest.mark.parametrize("min_probability", [0.0, 0.5])
def test_head_says_what_plain_decoding_says(
    mtp_gguf: Path, min_probability: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanorun.runtime.drafting.mtp._MIN_PROBABILITY", min_probability)
    plain, guessing = (
        Rig(mtp_gguf, replace(SMALL, speculation=speculation)) for speculation in ("off", "mtp")
    )
    assert replies(plain) == replies(guessing)
    drafted = sum(f.usage.drafted_tokens for f in guessing.finished.values())  # type: ignore[union-attr]
    assert (drafted > 50) is (min_probability == 0)
    plain.close()
    guessing.close()


def test_rolling_one_stream_back_leaves_another_one_alone(
    mtp_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanorun.runtime.drafting.mtp._MIN_PROBABILITY", 0.0)
    rig = Rig(mtp_gguf, replace(SMALL, n_ctx=256, speculation="mtp"))
    said, _ = rig.ask([609, 66, 344], n_tokens=11)
    other = rig.submit([32], n_tokens=3)
    rig.step()
    following = [*[609, 66, 344, *said][:14], 321, 192, 242, 375, 199, 111, 461]
    again = rig.submit(following, n_tokens=2)
    rig.run()
    rig.check(other)
    rig.check(again)
    rig.close()


def test_guesses_can_be_rolled_back_beside_streams_that_come_and_go(pico_f32_gguf: Path) -> None:
    """A sequence's cell moves when its neighbours change; found by random testing."""
    rig = Rig(pico_f32_gguf, replace(SMALL, n_ctx=256, speculation="lookup"))
    repeats = [35, 32, 33, 36, 32, 36, 34, 33, 36, 35, 36, 32, 36, 33, 32, 35]
    for prompt, n_tokens, background in (
        ([32], 13, False), ([32], 7, True), (repeats, 8, True), ([32, 32], 1, True),
        ([32], 2, True), ([32], 1, True), ([32], 6, False), ([32], 8, False),
    ):  # fmt: skip
        rig.submit(prompt, n_tokens=n_tokens, background=background)
    rig.run()
    for request_id in rig.replies:
        rig.check(request_id)
    rig.close()


def test_guesses_that_find_no_cell_are_left_out(
    mtp_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head guesses before there is room made for the batch."""
    monkeypatch.setattr("nanorun.runtime.drafting.mtp._MIN_PROBABILITY", 0.0)
    rig = Rig(mtp_gguf, replace(SMALL, n_ctx=256, speculation="mtp"))
    rig.ask([100 + i for i in range(200)], n_tokens=1)  # idle, it holds the cells
    running = rig.submit([32 + i for i in range(56)], n_tokens=10)
    rig.run()
    assert len(rig.said(running)) == 10
    rig.check(running)
    rig.close()


def test_head_that_is_not_there_is_refused(pico_f32_gguf: Path) -> None:
    with pytest.raises(UsageError, match="has no MTP head"):
        Rig(pico_f32_gguf, replace(SMALL, speculation="mtp"))


@pytest.mark.parametrize("options", [{"speculation": "magic"}, {"n_draft": 0}, {"n_draft": 99}])
def test_senseless_speculation_is_refused(pico_f32_gguf: Path, options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Rig(pico_f32_gguf, replace(SMALL, **{"speculation": "lookup", **options}))  # type: ignore[arg-type]
