from __future__ import annotations

import pytest

from nanorun.model.chat import (
    Finished,
    Message,
    Notice,
    PrefillProgress,
    TextDelta,
    ThinkingDelta,
    Timings,
    ToolArguments,
    ToolCall,
    ToolCallBegun,
    ToolCallDelta,
    Usage,
)
from nanorun.tui.reply import Phase, Reply


class Clock:
    """Time that passes when the test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reply(clock: Clock) -> Reply:
    return Reply(clock=clock)


def test_reply_goes_through_its_phases(reply: Reply) -> None:
    phases = [reply.phase]
    for event in (
        PrefillProgress(1, 2, 0),
        ThinkingDelta("hm"),
        TextDelta("yes"),
        Notice("the engine was restarted"),
        Finished("stop"),
    ):
        reply.take(event)
        phases.append(reply.phase)
    assert phases == [
        Phase.WAITING, Phase.READING, Phase.THINKING, Phase.ANSWERING, Phase.ANSWERING, Phase.ENDED,
    ]  # fmt: skip


def test_reply_counts_only_the_time_it_thinks(reply: Reply, clock: Clock) -> None:
    reply.take(PrefillProgress(5, 5, 0))
    clock.now += 7
    reply.take(ThinkingDelta("hm"))
    clock.now += 2
    assert reply.thinking_s == pytest.approx(2)
    reply.take(TextDelta("yes"))
    clock.now += 5
    assert reply.thinking_s == pytest.approx(2)


def test_reply_that_ends_in_thinking_keeps_its_time(reply: Reply, clock: Clock) -> None:
    reply.take(ThinkingDelta("hm"))
    clock.now += 3
    reply.end()
    clock.now += 5
    assert reply.thinking_s == pytest.approx(3)


def test_reply_gives_each_text_once(reply: Reply) -> None:
    reply.take(ThinkingDelta("a"))
    reply.take(ThinkingDelta("b"))
    reply.take(TextDelta("c"))
    assert (reply.take_thinking(), reply.take_answer()) == ("ab", "c")
    reply.take(TextDelta("d"))
    assert (reply.take_thinking(), reply.take_answer()) == ("", "d")


def test_reply_rate_is_counted_until_the_engine_tells_it(reply: Reply, clock: Clock) -> None:
    reply.take(TextDelta("a"))
    assert reply.tps is None
    for _ in range(10):
        clock.now += 0.1
        reply.take(TextDelta("a"))
    assert reply.tps == pytest.approx(10)
    reply.take(Finished("stop", timings=Timings(decode_tps=12.5)))
    assert reply.tps == 12.5


def test_reply_context_is_exact_at_the_end(reply: Reply) -> None:
    assert reply.n_used == 0
    reply.take(PrefillProgress(40, 90, 0))
    assert reply.n_used == 40
    reply.take(PrefillProgress(90, 90, 0))
    reply.take(TextDelta("two tokens"))
    assert reply.n_used == 91
    reply.take(Finished("stop", usage=Usage(prompt_tokens=90, completion_tokens=2)))
    assert reply.n_used == 92


def test_reply_becomes_a_message_with_its_thinking(reply: Reply) -> None:
    call = ToolCall("1", "add", {"a": 1})
    for event in (ThinkingDelta("hm"), TextDelta("yes"), ToolCallDelta(0, call)):
        reply.take(event)
    assert reply.message() == Message("assistant", "yes", thinking="hm", tool_calls=(call,))


def test_arguments_of_a_call_are_progress_after_the_thinking(reply: Reply) -> None:
    call = ToolCallBegun(0, "1", "write")
    for event in (ThinkingDelta("hm"), call, ToolArguments(0, '{"text": "'), ToolArguments(0, "a")):
        reply.take(event)
    assert (reply.phase, reply.n_deltas) == (Phase.ANSWERING, 3)
    assert not reply.has_answer


def test_reply_of_nothing_but_white_space_has_no_answer(reply: Reply) -> None:
    reply.take(ThinkingDelta("hm"))
    reply.take(TextDelta("\n"))
    assert not reply.has_answer


@pytest.mark.parametrize(
    ("answer", "end", "facts"),
    [
        (
            "yes",
            Finished("stop", Usage(completion_tokens=1500), Timings(decode_s=2, decode_tps=750)),
            "1,500 tokens · 2.0 s · 750.0 t/s",
        ),
        (
            "yes",
            Finished("length", Usage(completion_tokens=1), Timings(decode_s=1)),
            "cut off: the context is full · 1 token · 1.0 s",
        ),
        ("yes", Finished("cancelled"), "stopped"),
        ("", Finished("cancelled"), "stopped before it answered"),
        ("", Finished("stop"), "an empty answer"),
    ],
)
def test_reply_facts_say_how_it_ended(reply: Reply, answer: str, end: Finished, facts: str) -> None:
    reply.take(TextDelta(answer))
    reply.take(end)
    assert reply.facts() == facts


def test_reply_facts_say_how_far_the_prompt_is_read(reply: Reply) -> None:
    reply.take(PrefillProgress(512, 12_288, 0))
    assert reply.facts() == "reading 512 of 12k tokens"
