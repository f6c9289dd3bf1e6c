from __future__ import annotations

from nanorun.model.chat import (
    Event,
    Finished,
    Message,
    Notice,
    PrefillProgress,
    TextDelta,
    ThinkingDelta,
    TokenLogprobs,
    ToolArguments,
    ToolCall,
    ToolCallBegun,
    ToolCallDelta,
    arguments_text,
)
from nanorun.model.reply_so_far import BegunCall, ReplySoFar

CALL = ToolCall("c1", "add", {"a": 1})


def gathered(*events: Event) -> ReplySoFar:
    reply = ReplySoFar()
    for event in events:
        reply.take(event)
    return reply


def test_events_add_up_to_a_message_of_the_conversation() -> None:
    events: list[Event] = [ThinkingDelta("h"), ThinkingDelta("m"), TextDelta("ye"), TextDelta("s")]
    reply = gathered(*events, ToolCallDelta(0, CALL))
    assert reply.message() == Message("assistant", "yes", thinking="hm", tool_calls=(CALL,))
    assert gathered(TextDelta("yes")).message() == Message("assistant", "yes")


def test_what_is_not_said_is_kept_beside_it() -> None:
    token = TokenLogprobs(b"y", -0.5, (), False)
    progress, end = PrefillProgress(3, 9, 0), Finished("stop")
    reply = gathered(progress, Notice("slow"), token, end)
    assert (reply.prefill, reply.notices, reply.logprobs, reply.finished) == (
        progress,
        ["slow"],
        [token],
        end,
    )
    assert reply.message() == Message("assistant", "")


def test_thinking_ends_with_the_first_thing_said_or_with_the_reply() -> None:
    assert not gathered().is_thinking
    assert gathered(ThinkingDelta("hm"), Notice("slow")).is_thinking
    for after in (TextDelta("y"), ToolCallDelta(0, CALL), Finished("length")):
        assert not gathered(ThinkingDelta("hm"), after).is_thinking


def test_call_is_there_while_it_is_written() -> None:
    reply = gathered(ThinkingDelta("hm"), ToolCallBegun(0, "c1", "add"))
    assert not reply.is_thinking
    reply.take(ToolArguments(0, '{"a": '))
    assert (reply.begun, reply.calls) == ([BegunCall("c1", "add", '{"a": ')], [])
    reply.take(ToolArguments(0, "1}"))
    reply.take(ToolCallDelta(0, CALL))
    assert reply.begun == [BegunCall("c1", "add", arguments_text(CALL), is_complete=True)]
    assert reply.tool_calls == [CALL]


def test_call_that_could_not_be_read_completes_none_that_was_begun() -> None:
    unread = ToolCallDelta(0, ToolCall("c0", "", {}), "not a tool call: x")
    reply = gathered(unread, ToolCallBegun(0, "c1", "add"))
    assert reply.begun == [BegunCall("c1", "add")]
    reply = gathered(ToolCallBegun(0, "c1", "add"), unread)
    assert not reply.begun[0].is_complete
