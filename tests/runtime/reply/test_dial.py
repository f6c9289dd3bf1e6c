from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorun.model.think import Think
from nanorun.runtime.reply.dial import ReasoningDial, template_effort
from nanorun.runtime.reply.phase import Phase

EURO = "€".encode()


def think(dial: ReasoningDial, pieces: list[bytes]) -> Phase:
    """Take pieces as long as the dial does not close the thinking; what it asks for then."""
    for piece in pieces:
        if dial.asks_for is Phase.CLOSING:
            break
        dial.take(piece)
    return dial.asks_for


def test_dial_without_budget_asks_for_nothing() -> None:
    dial = ReasoningDial(None)
    assert think(dial, [b"word "] * 500) is Phase.THINKING
    assert dial.n_thinking == 500


def test_dial_waits_for_the_end_of_the_line() -> None:
    dial = ReasoningDial(3)
    assert think(dial, [b"a", b" b", b" c", b" d"]) is Phase.LANDING
    assert think(dial, [b"\n"]) is Phase.CLOSING
    assert (dial.n_thinking, dial.ends_line) == (5, True)


def test_dial_waits_for_the_end_of_a_sentence_but_not_for_a_decimal_point() -> None:
    dial = ReasoningDial(1)
    assert think(dial, [b"pi", b" is", b" 3", b"."]) is Phase.LANDING
    assert think(dial, [b"14", b" indeed"]) is Phase.LANDING
    assert think(dial, [b"."]) is Phase.CLOSING
    assert not dial.ends_line


def test_dial_closes_hard_at_the_end_of_the_grace() -> None:
    dial = ReasoningDial(10)
    assert think(dial, [b" word"] * (10 + 32 - 5)) is Phase.LANDING
    assert think(dial, [b" word"]) is Phase.CLOSING


def test_long_thinking_may_land_within_a_tenth_of_its_budget() -> None:
    dial = ReasoningDial(1000)
    assert think(dial, [b" word"] * (1000 + 100 - 5)) is Phase.LANDING
    assert think(dial, [b" word"]) is Phase.CLOSING


def test_dial_completes_a_character_first() -> None:
    dial = ReasoningDial(10)
    n_before = 10 + 32 - 5
    assert think(dial, [b"x"] * n_before + [EURO[:1], EURO[1:2]]) is Phase.LANDING
    assert think(dial, [EURO[2:]]) is Phase.CLOSING


def test_short_reply_completes_a_character_too() -> None:
    dial = ReasoningDial(None, max_reply=6)
    assert think(dial, [b"a", b"b", EURO[:1], EURO[1:2]]) is Phase.LANDING
    assert think(dial, [EURO[2:]]) is Phase.CLOSING


def test_thinking_gets_half_of_a_short_reply() -> None:
    assert think(ReasoningDial(None, max_reply=100), [b"word"] * 49) is Phase.THINKING
    assert think(ReasoningDial(None, max_reply=100), [b"word"] * 50) is Phase.LANDING
    # Its grace is a quarter of the reply, less what closes a character.
    assert think(ReasoningDial(None, max_reply=100), [b"word"] * 70) is Phase.LANDING
    assert think(ReasoningDial(None, max_reply=100), [b"word"] * 71) is Phase.CLOSING


def test_dial_with_budget_zero_closes_before_the_first_token() -> None:
    assert ReasoningDial(0).asks_for is Phase.CLOSING


@pytest.mark.parametrize("budget", [0, 5])
def test_budget_below_what_was_thought_lands_softly(budget: int) -> None:
    dial = ReasoningDial(None)
    think(dial, [b"word"] * 100 + [b"\xe2"])
    dial.set_budget(budget)
    assert dial.asks_for is Phase.LANDING  # in mid-character, and in mid-sentence
    assert think(dial, [b"\x82", b"\xac", b" is", b" a", b" lot"]) is Phase.LANDING
    assert think(dial, [b".\n"]) is Phase.CLOSING


def test_budget_lowered_again_and_again_does_not_put_off_the_end() -> None:
    dial = ReasoningDial(None)
    think(dial, [b"word"] * 10)
    for _ in range(32):
        dial.set_budget(0)
        think(dial, [b"word"])
    assert dial.asks_for is Phase.CLOSING


def test_raised_budget_lets_it_think_on() -> None:
    dial = ReasoningDial(2)
    assert think(dial, [b"a", b"b", b"c"]) is Phase.LANDING
    dial.set_budget(None)
    assert think(dial, [b"\n"] * 50) is Phase.THINKING


@given(
    budget=st.integers(0, 200),
    pieces=st.lists(
        st.sampled_from([b"a", b" b", b"\n", b".", b"\xe2", b"\x82", b"\xac"]), max_size=400
    ),
)
def test_thinking_never_exceeds_budget_and_grace(budget: int, pieces: list[bytes]) -> None:
    dial = ReasoningDial(budget)
    asks_for = think(dial, pieces)
    assert dial.n_thinking <= budget + 32  # a tenth of 200 is less
    if len(pieces) >= budget + 32:
        assert asks_for is Phase.CLOSING


@pytest.mark.parametrize(
    ("think", "template", "variables"),
    [
        ("low", "{% if low_effort %}", {"low_effort": True}),
        ("LOW ", "{% if low_effort %}", {"low_effort": True}),
        ("medium", "{% if low_effort %}", {}),
        ("medium", "{% if medium_effort %}", {"medium_effort": True}),
        ("low", "{% if medium_effort %}", {"medium_effort": True}),
        ("high", "{% if low_effort %}{% if medium_effort %}", {}),
        (300, "{% if low_effort %}", {}),
        ("low", "{% if enable_thinking %}", {}),
    ],
)
def test_levels_speak_to_templates_that_listen(
    think: str | int, template: str, variables: dict[str, bool]
) -> None:
    assert template_effort(Think.parse(think), template) == variables
