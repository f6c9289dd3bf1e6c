from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorun.model.think import Think
from nanorun.runtime.reply.dial import Phase, ReasoningDial, template_effort

NEWLINE, CLOSE = 1, 2
PIECES = {NEWLINE: b"\n", CLOSE: b"</think>"}


def make_dial(budget: int | None, *, thinking: bool = True) -> ReasoningDial:
    return ReasoningDial(
        budget,
        thinking=thinking,
        close_after_text=[NEWLINE, CLOSE, NEWLINE],
        close_after_newline=[CLOSE, NEWLINE],
    )


def say(dial: ReasoningDial, pieces: list[bytes], *, in_thinking: bool = True) -> list[int]:
    """Feed ordinary tokens; return what was forced in between, as token ids."""
    forced = []
    for piece in pieces:
        while (token := dial.forced()) is not None:
            forced.append(token)
            dial.observe(PIECES[token], in_thinking=token != CLOSE)
        dial.observe(piece, in_thinking=in_thinking)
    while (token := dial.forced()) is not None:
        forced.append(token)
        dial.observe(PIECES[token], in_thinking=token != CLOSE)
    return forced


def test_dial_without_budget_never_forces() -> None:
    dial = make_dial(None)
    assert say(dial, [b"word "] * 500) == []
    assert dial.phase is Phase.THINKING
    assert dial.n_thinking == 500


def test_dial_waits_for_the_end_of_the_line() -> None:
    dial = make_dial(3)
    say(dial, [b"a", b" b", b" c", b" d"])
    assert dial.phase is Phase.LANDING
    assert say(dial, [b"\n"]) == [CLOSE, NEWLINE]
    assert dial.phase is Phase.ANSWER
    assert dial.n_thinking == 5


def test_dial_waits_for_the_end_of_a_sentence_but_not_for_a_decimal_point() -> None:
    dial = make_dial(1)
    say(dial, [b"pi", b" is", b" 3", b"."])
    assert dial.phase is Phase.LANDING
    assert say(dial, [b"14", b" indeed", b"."]) == [NEWLINE, CLOSE, NEWLINE]


def test_dial_closes_hard_at_the_end_of_the_grace() -> None:
    dial = make_dial(10)
    forced = say(dial, [b" word"] * (10 + 32 - 4))
    assert forced == [NEWLINE, CLOSE, NEWLINE]
    assert dial.phase is Phase.ANSWER


def test_long_thinking_may_land_within_a_tenth_of_its_budget() -> None:
    dial = make_dial(1000)
    assert say(dial, [b" word"] * (1000 + 100 - 5)) == []
    assert say(dial, [b" word"]) == [NEWLINE, CLOSE, NEWLINE]


def test_dial_completes_a_character_first() -> None:
    dial = make_dial(10)
    euro = ["€".encode()[:1], "€".encode()[1:2], "€".encode()[2:]]
    n_before = 10 + 32 - 5
    assert say(dial, [b"x"] * n_before + euro[:2]) == []
    assert say(dial, euro[2:])[-2:] == [CLOSE, NEWLINE]


def test_dial_rests_once_the_reply_answers_by_itself() -> None:
    dial = make_dial(100)
    dial.observe(b"thought", in_thinking=True)
    dial.observe(b"</think>", in_thinking=False)
    assert dial.phase is Phase.ANSWER
    assert dial.n_thinking == 1


def test_dial_goes_on_counting_when_the_reply_thinks_again() -> None:
    dial = make_dial(5)
    dial.observe(b"thought", in_thinking=True)
    dial.observe(b"<tool_call>", in_thinking=False)
    assert say(dial, [b"\n"] * 4) == [CLOSE, NEWLINE]
    assert dial.n_thinking == 5


def test_dial_with_budget_zero_closes_before_the_first_token() -> None:
    dial = make_dial(0)
    assert dial.forced() == CLOSE


def test_dial_of_a_reply_without_thinking_rests() -> None:
    dial = make_dial(0, thinking=False)
    assert say(dial, [b"word"] * 100, in_thinking=False) == []
    assert dial.n_thinking == 0


def test_finish_thinking_lands_at_the_next_line() -> None:
    dial = make_dial(None)
    say(dial, [b"a", b"b"])
    dial.finish_thinking()
    assert dial.forced() is None
    assert say(dial, [b"\n"]) == [CLOSE, NEWLINE]


@pytest.mark.parametrize("budget", [0, 5])
def test_budget_below_what_was_thought_lands_softly(budget: int) -> None:
    dial = make_dial(None)
    say(dial, [b"word"] * 100 + [b"\xe2"])
    dial.set_budget(budget)
    assert dial.forced() is None  # in mid-character, and in mid-sentence
    assert say(dial, [b"\x82", b"\xac", b" is", b" a", b" lot"]) == []
    assert say(dial, [b".\n"]) == [CLOSE, NEWLINE]


def test_budget_lowered_again_and_again_does_not_put_off_the_end() -> None:
    dial = make_dial(None)
    say(dial, [b"word"] * 10)
    for _ in range(32):
        dial.set_budget(0)
        say(dial, [b"word"], in_thinking=dial.phase is not Phase.ANSWER)
    assert dial.phase is Phase.ANSWER


def test_thinking_that_begins_anew_after_its_end_is_held_to_the_same_budget() -> None:
    dial = make_dial(10)
    say(dial, [b"word"] * 9 + [b"\n"])
    assert dial.phase is Phase.ANSWER
    forced = say(dial, [b"word"] * (32 + 10))  # the model opened it again
    assert CLOSE in forced


def test_short_reply_completes_a_character_too() -> None:
    dial = ReasoningDial(
        None, thinking=True, close_after_text=[CLOSE], close_after_newline=[CLOSE], max_reply=6
    )
    euro = "€".encode()
    assert say(dial, [b"a", b"b", euro[:1], euro[1:2]]) == []
    assert say(dial, [euro[2:]]) == [CLOSE]


def test_rescue_turns_an_early_end_into_an_answer() -> None:
    dial = make_dial(None)
    say(dial, [b"hm"])
    assert dial.rescue()
    assert say(dial, []) == [NEWLINE, CLOSE, NEWLINE]
    assert not dial.rescue()


def test_raised_budget_lets_it_think_on() -> None:
    dial = make_dial(2)
    say(dial, [b"a", b"b", b"c"])
    assert dial.phase is Phase.LANDING
    dial.set_budget(None)
    assert say(dial, [b"\n"] * 50) == []
    assert dial.phase is Phase.THINKING


@given(
    budget=st.integers(0, 200),
    pieces=st.lists(
        st.sampled_from([b"a", b" b", b"\n", b".", b"\xe2", b"\x82", b"\xac"]), max_size=400
    ),
)
def test_thinking_never_exceeds_budget_and_grace(budget: int, pieces: list[bytes]) -> None:
    dial = make_dial(budget)
    forced: list[int] = []
    for piece in pieces:
        forced += say(dial, [piece], in_thinking=dial.phase is not Phase.ANSWER)
    assert dial.n_thinking <= budget + 32  # a tenth of 200 is less
    if len(pieces) >= budget + 32:
        assert forced[-2:] == [CLOSE, NEWLINE]
        assert dial.phase is Phase.ANSWER


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
