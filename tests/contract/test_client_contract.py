"""What every client promises, local or remote: the same questions, the same kinds of events."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import pytest

from nanorun.errors import ContextFull, EngineDied, UsageError
from nanorun.model.chat import (
    Event,
    Finished,
    GenerateOptions,
    Message,
    PrefillProgress,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
)
from nanorun.model.think import MAX, OFF, Think, grace_tokens
from nanorun.runtime.protocol import Client, Generation
from tests.contract.conftest import Subject

THINK_END = 13
SUM = [Message("user", "What is 4785 + 697?")]
GREEDY = GenerateOptions(temperature=0.0, max_tokens=400)
ENDLESS = GenerateOptions(think=OFF, temperature=0.0, ignore_eos=True)
PONDERING = GenerateOptions(
    think=MAX,
    temperature=0.0,
    logit_bias=((THINK_END, -100.0),),
    ignore_eos=True,
    max_tokens=600,
)
"""Never ends its thinking by itself; at half of the tokens it is made to."""
CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "The expression."}},
            "required": ["expression"],
        },
    },
}


async def events_of(generation: Generation) -> list[Event]:
    return [event async for event in generation]


async def ask(
    client: Client, messages: list[Message] = SUM, options: GenerateOptions = GREEDY
) -> list[Event]:
    return await events_of(client.generate(messages, options))


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def thinking_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, ThinkingDelta))


def end_of(events: list[Event]) -> Finished:
    *before, last = events
    assert isinstance(last, Finished)
    assert not any(isinstance(event, Finished) for event in before)
    return last


async def read_until(generation: Generation, kind: type, n: int) -> list[Event]:
    """Events up to the nth of a kind."""
    events: list[Event] = []
    while sum(isinstance(event, kind) for event in events) < n:
        events.append(await anext(generation))  # type: ignore[call-overload]
    return events


async def test_start_tells_what_answers_and_may_be_repeated(subject: Subject) -> None:
    info = await subject.client.start()
    assert (info.n_ctx, info.n_params, info.n_vocab) == (4096, 6_462_112, 1024)
    assert await subject.client.start() == info == subject.client.info


async def test_answer_and_thinking_come_apart_and_in_order(subject: Subject) -> None:
    events = await ask(subject.client)
    assert text_of(events) == "5482"
    assert thinking_of(events).startswith("5+7+0=12")
    assert "think>" not in thinking_of(events) + text_of(events)
    kinds = [type(event) for event in events if not isinstance(event, PrefillProgress)]
    assert kinds == sorted(kinds, key=[ThinkingDelta, TextDelta, Finished].index)
    assert isinstance(events[0], PrefillProgress)
    assert end_of(events).reason == "stop"


async def test_thinking_off_answers_at_once(subject: Subject) -> None:
    events = await ask(subject.client, options=replace(GREEDY, think=OFF))
    assert thinking_of(events) == ""
    assert text_of(events).strip().isdigit()


async def test_usage_adds_up(subject: Subject) -> None:
    usage = end_of(await ask(subject.client)).usage
    assert usage.prompt_tokens == 28
    assert 0 <= usage.cached_tokens < usage.prompt_tokens
    # Closing tags and the end of the turn count too; servers differ in where.
    assert 30 <= usage.thinking_tokens < usage.completion_tokens <= 50


async def test_timings_are_filled(subject: Subject) -> None:
    timings = end_of(await ask(subject.client)).timings
    assert timings.decode_s > 0
    assert timings.decode_tps > 1


async def test_stop_string_ends_the_answer_and_not_the_thinking(subject: Subject) -> None:
    events = await ask(subject.client, options=replace(GREEDY, stop=("82", "no")))
    assert "8" in thinking_of(events)
    assert text_of(events) == "54"
    end = end_of(events)
    assert (end.reason, end.stop_text) == ("stop", "82")


async def test_stop_string_in_the_thinking_stops_nothing(subject: Subject) -> None:
    events = await ask(subject.client, options=replace(GREEDY, stop=("=12",)))
    assert "=12" in thinking_of(events)
    assert text_of(events) == "5482"


async def test_max_tokens_end_with_length(subject: Subject) -> None:
    end = end_of(await ask(subject.client, options=replace(ENDLESS, max_tokens=9)))
    assert (end.reason, end.usage.completion_tokens) == ("length", 9)


async def test_same_seed_gives_the_same_text(subject: Subject) -> None:
    # Few tokens: whether the prompt was read at once or found changes the last bits of logits.
    options = replace(ENDLESS, temperature=1.5, top_p=1.0, top_k=0, min_p=0.0, max_tokens=12)
    texts = [
        text_of(await ask(subject.client, options=replace(options, seed=seed)))
        for seed in (5, 5, 6)
    ]
    assert texts[0] == texts[1] != texts[2]


async def test_cancel_ends_the_reply_and_the_next_is_answered(subject: Subject) -> None:
    generation = subject.client.generate(SUM, ENDLESS)
    await read_until(generation, TextDelta, 3)
    await generation.cancel()
    rest = await events_of(generation)
    assert end_of(rest).reason == "cancelled"
    assert end_of(rest).usage.completion_tokens >= 3
    assert text_of(await ask(subject.client)) == "5482"


async def test_closing_early_leaves_nothing_behind(subject: Subject) -> None:
    for _ in range(6):  # more than there are places
        generation = subject.client.generate(SUM, ENDLESS)
        await read_until(generation, TextDelta, 1)
        await generation.aclose()
        assert await events_of(generation) == []
    assert text_of(await ask(subject.client)) == "5482"


async def test_cancelled_reader_cancels_the_reply(subject: Subject) -> None:
    generation = subject.client.generate(SUM, ENDLESS)
    await read_until(generation, TextDelta, 1)
    reader = asyncio.ensure_future(events_of(generation))
    await asyncio.sleep(0.02)
    reader.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reader
    assert reader.cancelled()
    assert text_of(await ask(subject.client)) == "5482"


async def test_streams_run_beside_each_other(subject: Subject) -> None:
    pairs = [(4785, 697), (120, 345), (999, 1), (77, 808)]
    questions = [[Message("user", f"What is {a} + {b}?")] for a, b in pairs]
    replies = await asyncio.gather(*(ask(subject.client, question) for question in questions))
    assert [text_of(events) for events in replies] == [str(a + b) for a, b in pairs]


async def test_conversation_goes_on_with_and_without_its_thinking(subject: Subject) -> None:
    before = [
        Message("system", "Add."),
        Message("user", "What is 12 + 30?"),
        Message("assistant", "42", thinking="2+0+0=2, 1+3+0=4"),
        *SUM,
    ]
    short = await ask(subject.client, before)
    long = await ask(subject.client, before, replace(GREEDY, keep_thinking=True))
    # Truncated, the earlier thinking takes no tokens of the prompt.
    assert end_of(long).usage.prompt_tokens > end_of(short).usage.prompt_tokens + 10


async def test_tool_call_is_typed_and_its_result_is_taken(subject: Subject) -> None:
    question = Message("user", "What is 12 * 34?")
    options = replace(GREEDY, tools=(CALCULATOR,))
    events = await ask(subject.client, [question], options)
    (delta,) = [event for event in events if isinstance(event, ToolCallDelta)]
    assert (delta.index, delta.call.name, delta.problem) == (0, "calculator", None)
    assert set(delta.call.arguments) == {"expression"}
    assert isinstance(delta.call.arguments["expression"], str)
    assert delta.call.id
    assert end_of(events).reason == "tool_calls"
    assert "tool_call" not in text_of(events)
    call = Message("assistant", thinking=thinking_of(events), tool_calls=(delta.call,))
    if subject.kind == "llama.cpp":
        return  # it gives templates the arguments as text, and pico's asks for an object
    result = Message("tool", "408", tool_call_id=delta.call.id)
    end = end_of(await ask(subject.client, [question, call, result], options))
    assert end.reason in ("stop", "tool_calls")


@pytest.mark.parametrize(
    ("messages", "options", "says"),
    [
        (SUM, GenerateOptions(max_tokens=0), "max_tokens 0 is less than 1"),
        ([], GREEDY, "no messages"),
    ],
)
async def test_options_that_make_no_sense_are_refused(
    subject: Subject, messages: list[Message], options: GenerateOptions, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        await ask(subject.client, messages, options)


async def test_prompt_beyond_the_context_is_its_own_error(subject: Subject) -> None:
    with pytest.raises(ContextFull):
        await ask(subject.client, [Message("user", "1 + " * 5000)])
    assert text_of(await ask(subject.client)) == "5482"


async def test_budget_bounds_the_thinking(subject: Subject) -> None:
    events = await ask(subject.client, options=replace(PONDERING, think=Think(40), max_tokens=300))
    usage = end_of(events).usage
    # Servers count the closing tokens to either part.
    assert 40 <= usage.thinking_tokens <= 40 + grace_tokens(40) + 6
    assert text_of(events)


async def test_answer_now_ends_the_thinking(subject: Subject) -> None:
    generation = subject.client.generate(SUM, PONDERING)
    before = await read_until(generation, ThinkingDelta, 20)
    await generation.finish_thinking()
    after = await events_of(generation)
    assert end_of(after).usage.thinking_tokens < 300
    assert text_of(before) == ""
    assert text_of(after)


async def test_budget_can_be_set_while_it_thinks(subject: Subject) -> None:
    generation = subject.client.generate(SUM, PONDERING)
    await read_until(generation, ThinkingDelta, 10)
    await generation.set_budget(60)
    after = await events_of(generation)
    assert 60 <= end_of(after).usage.thinking_tokens < 300
    assert text_of(after)


async def test_death_in_mid_answer_is_an_error_and_the_next_request_works(
    subject: Subject,
) -> None:
    generation = subject.client.generate(SUM, ENDLESS)
    await read_until(generation, TextDelta, 2)
    subject.kill()
    with pytest.raises(EngineDied):
        await events_of(generation)
    assert await events_of(generation) == []
    subject.restart()
    assert text_of(await ask(subject.client)) == "5482"


async def test_closing_the_client_ends_its_replies(subject: Subject) -> None:
    generation = subject.client.generate(SUM, ENDLESS)
    await read_until(generation, TextDelta, 2)
    await subject.client.close()
    with pytest.raises(EngineDied):
        await events_of(generation)
