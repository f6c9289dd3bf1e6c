"""A reply, fed with numpy arrays: no engine, no model."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanorun.errors import UsageError
from nanorun.model.chat import (
    Event,
    TextDelta,
    ThinkingDelta,
    TokenLogprobs,
    ToolCallDelta,
)
from nanorun.runtime.reply.constraint import Form
from nanorun.runtime.reply.phase import Phase
from nanorun.runtime.reply.reply import Advance, Reply, ReplySettings
from nanorun.runtime.sampling.sampler import Sampler
from nanorun.runtime.sampling.settings import SamplingSettings

PIECES = [
    b"</s>", b"<think>", b"</think>", b"<tool_call>", b"</tool_call>", b"\n",
    b"a", b"b", b"c", b".", b"<function=f>\n</function>\n", b" stop", b"\xe2", b"\x82", b"\xac",
]  # fmt: skip
END, THINK, END_THINK, CALL, END_CALL, NEWLINE, A, B, C, DOT, FUNCTION, STOP, E2, X82, XAC = range(
    len(PIECES)
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


class FakeVocabulary:
    n_vocab = len(PIECES)
    end_tokens = frozenset({END})
    control_tokens = frozenset({END, THINK, END_THINK, CALL, END_CALL})
    closing_after_text = (NEWLINE, END_THINK, NEWLINE)
    closing_after_newline = (END_THINK, NEWLINE)

    def piece(self, token: int) -> bytes:
        return PIECES[token]


class FakeMatcher:
    """A form of exactly these tokens."""

    def __init__(self, tokens: list[int], *, tells: bool = False) -> None:
        self.tokens = list(tokens)
        self._tells = tells

    def allowed(self) -> np.ndarray:
        if not self.tokens:
            raise UsageError("the grammar broke down")
        return np.array(self.tokens[:1])

    def consume(self, token: int) -> None:
        self.tokens = self.tokens[1:] if self.tokens[:1] == [token] else []

    def expected(self) -> list[int]:
        return self.tokens if self._tells else []

    def n_admitted(self, tokens: list[int]) -> int:
        n = 0
        while n < len(tokens) and tokens[: n + 1] == self.tokens[: n + 1]:
            n += 1
        return n

    @property
    def is_over(self) -> bool:
        return not self.tokens


def new_reply(n_most: int = 1000, **settings: Any) -> Reply:
    sampling = SamplingSettings(temperature=0.0, logprobs=settings.pop("logprobs", None))
    return Reply(
        ReplySettings(sampling, **settings),
        FakeVocabulary(),
        Sampler(sampling),
        n_most,
    )


def wants(*tokens: int) -> np.ndarray:
    """Logits of a model that wants these tokens, one a row, and the ones after it a bit less."""
    logits = np.tile(-np.arange(len(PIECES), dtype=np.float32), (len(tokens), 1))
    logits[np.arange(len(tokens)), tokens] = 100.0
    return logits


def say(reply: Reply, *tokens: int) -> tuple[list[int], list[Event]]:
    """What a reply says, one token at a time, to a model that wants these in turn.

    What is forced comes between them.
    """
    said: list[int] = []
    events: list[Event] = []
    waiting = list(tokens)
    while reply.end is None and (waiting or reply.expected()):
        wanted = A if reply.phase is Phase.CLOSING else waiting.pop(0)
        advance = reply.advance(wants(wanted))
        assert advance.failure is None
        said += [] if advance.token is None else [advance.token]
        events += advance.events
    return said, events


def text_of(events: list[Event], kind: type = TextDelta) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def test_reply_goes_from_thinking_to_its_end() -> None:
    reply = new_reply(thinks=True)
    phases = []
    for token in (A, END_THINK, NEWLINE, B, END):
        reply.advance(wants(token))
        phases.append(reply.phase)
    assert phases == [
        Phase.THINKING, Phase.ANSWERING, Phase.ANSWERING, Phase.ANSWERING, Phase.ENDED
    ]  # fmt: skip
    assert (reply.end, reply.n_tokens, reply.n_thinking) == ("stop", 4, 1)


def test_thinking_and_answer_are_told_apart() -> None:
    _, events = say(new_reply(thinks=True), A, B, END_THINK, NEWLINE, C, DOT, END)
    assert text_of(events, ThinkingDelta) == "ab"
    assert text_of(events) == "c."


@pytest.mark.parametrize(("budget", "thought"), [(0, []), (1, [A, NEWLINE]), (2, [A, NEWLINE])])
def test_budget_closes_thinking_at_the_end_of_a_line(budget: int, thought: list[int]) -> None:
    reply = new_reply(thinks=True, budget=budget)
    said, _ = say(reply, A, NEWLINE, B, B, B, END)
    assert said[: len(thought) + 2] == [*thought, END_THINK, NEWLINE]
    assert reply.n_thinking == len(thought)
    assert reply.phase is Phase.ENDED


def test_answer_now_lands_at_the_next_sentence() -> None:
    reply = new_reply(thinks=True)
    say(reply, A, B)
    reply.finish_thinking()
    assert reply.phase is Phase.LANDING
    said, _ = say(reply, C, DOT)
    assert said == [C, DOT, NEWLINE, END_THINK, NEWLINE]
    assert reply.phase is Phase.ANSWERING


def test_answer_now_while_it_answers_changes_nothing() -> None:
    reply = new_reply(thinks=True)
    say(reply, A, END_THINK, B)
    reply.finish_thinking()
    assert say(reply, C, END)[0] == [C]


def test_end_while_thinking_becomes_the_end_of_thinking() -> None:
    reply = new_reply(thinks=True)
    said, events = say(reply, A, END, B, END)
    assert said == [A, NEWLINE, END_THINK, NEWLINE, B]
    assert text_of(events) == "b"


def test_thinking_that_begins_anew_is_held_to_the_same_budget() -> None:
    reply = new_reply(thinks=True, budget=3)
    say(reply, A, END_THINK, B, THINK)
    assert reply.phase is Phase.THINKING
    said, _ = say(reply, *[A] * 40)
    assert END_THINK in said


def test_thinking_that_was_closed_is_not_opened_again() -> None:
    reply = new_reply(thinks=True, budget=0)
    say(reply)
    logits = wants(THINK)
    logits[0, END] = 50.0  # is no answer either
    logits[0, B] = 49.0
    assert reply.advance(logits).token == B


def test_end_right_after_thinking_is_refused_eight_times() -> None:
    reply = new_reply(thinks=True)
    said, _ = say(reply, A, END_THINK, *[END] * 20)
    # Each time the next likeliest token, a `<think>`, opens thinking that its end closes again;
    # a model that insists has its way.
    assert reply.end == "stop"
    assert len(said) < 60
    silent = new_reply(thinks=True)
    say(silent, A, END_THINK)
    logits = wants(END)
    logits[0, NEWLINE] = 50.0  # what it says instead is no answer either
    for _ in range(8):
        assert silent.advance(logits).token == NEWLINE
    assert silent.advance(logits).token is None
    assert silent.end == "stop"


def test_answer_may_end_once_something_was_said() -> None:
    reply = new_reply(thinks=True)
    assert say(reply, A, END_THINK, B, END)[0] == [A, END_THINK, B]


def test_stop_string_ends_the_answer_and_is_not_part_of_it() -> None:
    reply = new_reply(stop=(" stop",))
    _, events = say(reply, A, STOP, B)
    events += reply.last_words()
    assert (text_of(events), reply.stopped_by, reply.end) == ("a", " stop", "stop")


def test_reply_is_cut_off_at_its_limit_and_says_what_it_held_back() -> None:
    reply = new_reply(max_tokens=3, stop=("bc",))
    _, events = say(reply, A, A, B, C)
    assert (reply.end, reply.n_tokens, text_of(events)) == ("length", 3, "aa")
    assert text_of(reply.last_words()) == "b"


def test_limit_is_what_there_is_room_for() -> None:
    reply = new_reply(n_most=2, max_tokens=50)
    say(reply, A, A, A)
    assert (reply.end, reply.n_tokens) == ("length", 2)


def test_reply_that_calls_a_tool_says_so_at_its_end() -> None:
    reply = new_reply(tools=(TOOL,))
    _, events = say(reply, CALL)
    assert reply.phase is Phase.CALLING
    _, events = say(reply, NEWLINE, FUNCTION, END_CALL, END)
    events += reply.last_words()
    assert [e.call.name for e in events if isinstance(e, ToolCallDelta)] == ["f"]
    assert reply.end == "tool_calls"


def test_call_is_text_where_no_tools_are_offered() -> None:
    reply = new_reply()
    _, events = say(reply, A, CALL, NEWLINE, FUNCTION, END_CALL, END)
    events += reply.last_words()
    assert text_of(events) == "a<tool_call>\n<function=f>\n</function>\n</tool_call>"
    assert reply.end == "stop"


def test_thinking_with_a_call_in_it_is_closed_where_no_tools_are_offered() -> None:
    reply = new_reply(thinks=True)
    said, events = say(reply, A, CALL, END, B, END)
    events += reply.last_words()
    assert said == [A, CALL, NEWLINE, END_THINK, NEWLINE, B]
    assert text_of(events, ThinkingDelta) == "a<tool_call>"
    assert (text_of(events), reply.end) == ("b", "stop")


def test_likelihood_is_told_before_the_text() -> None:
    reply = new_reply(logprobs=1, thinks=True)
    _, events = say(reply, A)
    first, second = events
    assert isinstance(first, TokenLogprobs) and isinstance(second, ThinkingDelta)
    assert (first.piece, first.in_thinking, round(first.logprob, 3)) == (b"a", True, 0.0)


def listed(events: list[Event], *, in_thinking: bool = False) -> list[bytes]:
    logprobs = [event for event in events if isinstance(event, TokenLogprobs)]
    return [event.piece for event in logprobs if event.in_thinking is in_thinking]


def test_only_tokens_of_the_text_are_listed() -> None:
    reply = new_reply(logprobs=1, thinks=True)
    _, events = say(reply, NEWLINE, A, NEWLINE, B, NEWLINE, END_THINK, NEWLINE, NEWLINE, C, E2, X82,
                    XAC, NEWLINE, NEWLINE, A, NEWLINE, END)  # fmt: skip
    events += reply.last_words()
    assert listed(events, in_thinking=True) == [b"a", b"\n", b"b"]
    assert listed(events) == [b"c", b"\xe2", b"\x82", b"\xac", b"\n", b"\n", b"a"]
    assert text_of(events) == "c\u20ac\n\na"


def test_token_that_a_stop_string_cuts_is_listed_with_what_is_left() -> None:
    reply = new_reply(logprobs=1, stop=("top", "bc"))
    _, events = say(reply, A, B, STOP)
    events += reply.last_words()
    assert (text_of(events), listed(events)) == ("ab s", [b"a", b"b", b" s"])


def test_text_of_a_token_before_and_after_a_stop_string_is_told_apart() -> None:
    reply = new_reply(logprobs=1, stop=("to",))
    _, events = say(reply, A, STOP)
    events += reply.last_words()
    assert (text_of(events), listed(events)) == ("a s", [b"a", b" s"])


def test_tokens_of_calls_are_not_listed() -> None:
    reply = new_reply(logprobs=1, tools=(TOOL,))
    _, events = say(reply, A, NEWLINE, CALL, NEWLINE, FUNCTION, END_CALL, NEWLINE, B, END)
    events += reply.last_words()
    assert (text_of(events), listed(events)) == ("a\n\nb", [b"a", b"b"])


@given(
    st.lists(st.integers(0, len(PIECES) - 1), max_size=40),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(), (" stop",), ("bc", "\n\n")]),
)
@example([12, 1, 13], True, False, ())
def test_tokens_listed_make_the_text(
    tokens: list[int], thinks: bool, plain: bool, stop: tuple[str, ...]
) -> None:
    reply = new_reply(logprobs=0, thinks=thinks, plain=plain, stop=stop, ignore_eos=True)
    _, events = say(reply, *tokens)
    events += reply.last_words()
    for in_thinking, kind in ((True, ThinkingDelta), (False, TextDelta)):
        text = b"".join(listed(events, in_thinking=in_thinking)).decode("utf-8", "replace")
        assert one_mark(text) == one_mark(text_of(events, kind))


def one_mark(text: str) -> str:
    """How many marks stand for bytes that are no characters depends on where they were parted: a
    token that is not listed may have stood between."""
    return re.sub("\N{REPLACEMENT CHARACTER}+", "\N{REPLACEMENT CHARACTER}", text)


def test_end_of_sequence_can_be_ignored() -> None:
    reply = new_reply(ignore_eos=True)
    assert say(reply, END, A)[0] == [END, A]


# -- forms ------------------------------------------------------------------------------------


def matcher(*tokens: int, tells: bool = False) -> Any:
    return FakeMatcher([*tokens], tells=tells)


def held(*tokens: int, tells: bool = False) -> Form:
    return Form(reply=lambda: matcher(*tokens, tells=tells), call_token=CALL)


def test_answer_is_held_to_its_form_and_thinking_is_free() -> None:
    reply = new_reply(thinks=True, form=held(B, C))
    assert say(reply, A, A, END_THINK, A, A)[0] == [A, A, END_THINK, B, C]
    assert reply.end == "stop"


def test_form_begins_once_forced_closing_is_through() -> None:
    reply = new_reply(thinks=True, budget=0, form=held(B, C))
    assert say(reply, A, A)[0] == [END_THINK, NEWLINE, B, C]


def test_call_is_held_and_the_text_after_it_is_free() -> None:
    form = Form(
        call=lambda: matcher(CALL, NEWLINE, FUNCTION, END_CALL),
        call_token=CALL,
    )
    reply = new_reply(tools=(TOOL,), form=form)
    said, _ = say(reply, A, CALL, A, A, A, B, END)
    assert said == [A, CALL, NEWLINE, FUNCTION, END_CALL, B]


def test_form_that_breaks_down_fails_the_reply() -> None:
    reply = new_reply(form=Form(reply=matcher, call_token=CALL))
    advance = reply.advance(wants(A))
    assert isinstance(advance.failure, UsageError)


# -- guesses ----------------------------------------------------------------------------------


def test_guesses_are_kept_as_far_as_they_hold() -> None:
    reply = new_reply()
    advance = reply.advance(wants(A, B, C, A), [A, B, A])
    assert (advance.n_accepted, advance.token, reply.n_tokens) == (2, C, 3)


def test_guesses_end_with_the_reply() -> None:
    reply = new_reply(max_tokens=2)
    advance = reply.advance(wants(A, B, C), [A, B])
    assert (advance.n_accepted, advance.token, reply.end) == (1, B, "length")


def test_form_cuts_a_guess_where_it_leaves_it() -> None:
    reply = new_reply(form=held(A, B, C))
    assert reply.admitted([A, B, A]) == [A, B]
    assert new_reply().admitted([A, B, A]) == [A, B, A]


def test_form_and_dial_know_what_comes_next() -> None:
    assert new_reply(form=held(A, B, tells=True)).expected() == [A, B]
    assert new_reply(thinks=True, budget=0).expected() == [END_THINK, NEWLINE]
    assert new_reply().expected() == []


TOKENS = st.integers(0, len(PIECES) - 1)


@given(
    wanted=st.lists(TOKENS, min_size=1, max_size=60),
    guesses=st.lists(st.lists(TOKENS, max_size=4), max_size=60),
    thinks=st.booleans(),
    budget=st.none() | st.integers(0, 5),
    form=st.none() | st.lists(st.integers(A, DOT), min_size=1, max_size=8),
    max_tokens=st.none() | st.integers(1, 30),
)
def test_guessing_changes_nothing_that_is_said(
    wanted: list[int],
    guesses: list[list[int]],
    thinks: bool,
    budget: int | None,
    form: list[int] | None,
    max_tokens: int | None,
) -> None:
    """A model wants a token by the number of those said; guesses come right now and then."""

    def settings() -> dict[str, Any]:
        held_to = None if form is None else held(*form, tells=len(form) % 2 == 0)
        return {
            "thinks": thinks, "budget": budget, "max_tokens": max_tokens, "tools": (TOOL,),
            "form": held_to,
        }  # fmt: skip

    def logits(reply: Reply, n_rows: int) -> np.ndarray:
        n = reply.n_tokens
        return wants(*(wanted[i % len(wanted)] for i in range(n, n + n_rows)))

    plain, guessing = new_reply(200, **settings()), new_reply(200, **settings())
    seen: list[list[Any]] = []
    for reply, all_drafts in ((plain, []), (guessing, guesses)):
        advances: list[Advance] = []
        drafts_in_turn = iter(all_drafts)
        while reply.end is None:
            drafts = (reply.expected() if all_drafts else []) or next(drafts_in_turn, [])
            drafts = reply.admitted(drafts) if not reply.expected() else drafts
            advance = reply.advance(logits(reply, 1 + len(drafts)), drafts)
            advances.append(advance)
            if advance.failure is not None:
                break
        events = [event for advance in advances for event in advance.events] + reply.last_words()
        seen.append([
            text_of(events, ThinkingDelta), text_of(events), reply.end, reply.n_tokens,
            reply.n_thinking, sum(isinstance(event, ToolCallDelta) for event in events),
        ])  # fmt: skip
    assert seen[0] == seen[1]


# -- going on -----------------------------------------------------------------------------------


def test_answer_that_is_continued_keeps_its_blanks_and_is_past_thinking() -> None:
    reply = new_reply(begun="a")
    _, events = say(reply, NEWLINE, NEWLINE, B, THINK, A)
    assert reply.phase is Phase.THINKING  # a control token still is what it is
    assert text_of(events) == "\n\nb"
    typed = new_reply(begun="a")
    assert typed.phase is Phase.ANSWERING


def test_thinking_that_is_continued_ends_on_a_line_of_its_own() -> None:
    for begun, closing in (("a", [NEWLINE, END_THINK, NEWLINE]), ("a\n", [END_THINK, NEWLINE])):
        reply = new_reply(begun=begun, thinks=True, budget=0)
        said, events = say(reply, B, END)
        assert said == [*closing, B]
        assert text_of(events) == "b"


def test_thinking_that_is_continued_keeps_its_line_breaks() -> None:
    _, events = say(new_reply(begun="a", thinks=True), NEWLINE, B, END_THINK, NEWLINE, C, END)
    assert text_of(events, ThinkingDelta) == "\nb"
    assert text_of(events) == "c"
