"""Going on with the last message instead of answering it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nanorun.errors import UsageError
from nanorun.model.chat import (
    Event,
    Finished,
    GenerateOptions,
    Grammar,
    Message,
    Notice,
    RawPrompt,
    TextDelta,
    ThinkingDelta,
    ToolCall,
)
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import OFF
from nanorun.runtime.client import EngineClient

SUM = Message("user", "What is 4785 + 697?")
GREEDY = GenerateOptions(temperature=0.0, max_tokens=400)
GO_ON = replace(GREEDY, continue_final=True)


@pytest.fixture
async def client(pico_gguf: Path) -> AsyncIterator[EngineClient]:
    client = EngineClient(pico_gguf, EngineOptions(n_ctx=2048, n_threads=1))
    yield client
    await client.close()


async def events_of(
    client: EngineClient, messages: Sequence[Message], options: GenerateOptions
) -> list[Event]:
    return [event async for event in client.generate(messages, options)]


def text_of(events: list[Event], kind: type = TextDelta) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def n_read(events: list[Event]) -> int:
    finished = events[-1]
    assert isinstance(finished, Finished)
    return finished.usage.prompt_tokens - finished.usage.cached_tokens


async def test_answer_goes_on_where_it_was_cut(client: EngineClient) -> None:
    whole = await events_of(client, [SUM], GREEDY)
    thinking, answer = text_of(whole, ThinkingDelta), text_of(whole)
    assert answer == "5482"
    for n in range(1, len(answer)):
        begun = Message("assistant", answer[:n], thinking=thinking)
        events = await events_of(client, [SUM, begun], GO_ON)
        assert text_of(events) == answer[n:]
        assert not text_of(events, ThinkingDelta)


async def test_thinking_goes_on_where_it_was_cut(client: EngineClient) -> None:
    whole = await events_of(client, [SUM], GREEDY)
    thinking = text_of(whole, ThinkingDelta)
    for n in (1, 9, len(thinking) - 1):
        begun = Message("assistant", thinking=thinking[:n])
        events = await events_of(client, [SUM, begun], GO_ON)
        assert text_of(events, ThinkingDelta) == thinking[n:]
        assert text_of(events) == "5482"


async def test_thinking_goes_no_further_than_it_may(client: EngineClient) -> None:
    begun = Message("assistant", thinking="5+7+0=12, 8+9+1=18")
    events = await events_of(client, [SUM, begun], replace(GO_ON, think=OFF))
    assert not text_of(events, ThinkingDelta)
    assert text_of(events)


async def test_closed_thinking_in_the_text_is_answered(client: EngineClient) -> None:
    whole = await events_of(client, [SUM], GREEDY)
    thinking = text_of(whole, ThinkingDelta)
    begun = Message("assistant", f"<think>\n{thinking}\n</think>\n\n")
    events = await events_of(client, [SUM, begun], GO_ON)
    assert (text_of(events, ThinkingDelta), text_of(events)) == ("", "5482")


async def test_blanks_that_the_template_leaves_out_are_told(client: EngineClient) -> None:
    for content, n_notices in (("54", 0), ("54 \n", 1)):
        events = await events_of(client, [SUM, Message("assistant", content)], GO_ON)
        notices = [event.text for event in events if isinstance(event, Notice)]
        assert len(notices) == n_notices
        assert all("leaves out white space" in text for text in notices)


async def test_history_is_not_read_again(client: EngineClient) -> None:
    earlier = [Message("system", "You add numbers. " * 30), SUM, Message("assistant", "5482")]
    history = [*earlier, Message("user", "What is 12 + 30?")]
    await events_of(client, history, GREEDY)
    events = await events_of(client, [*history, Message("assistant", "4")], GO_ON)
    begun = "<|im_start|>assistant\n<think></think>4"
    assert n_read(events) <= len(await client.tokenize(begun, special=True))


@pytest.mark.parametrize(
    ("messages", "options", "says"),
    [
        ([SUM], GO_ON, "the last is of role user"),
        (
            [SUM, Message("assistant", "a", tool_calls=(ToolCall("1", "f", {}),))],
            GO_ON,
            "tool calls cannot be continued",
        ),
        (
            [SUM, Message("assistant", "5")],
            replace(GO_ON, grammar=Grammar("regex", "[0-9]+")),
            "cannot be held to a grammar",
        ),
    ],
)
async def test_what_cannot_be_continued_is_refused(
    client: EngineClient, messages: list[Message], options: GenerateOptions, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        await events_of(client, messages, options)


async def test_raw_prompts_have_no_last_message(client: EngineClient) -> None:
    with pytest.raises(UsageError, match="no last message"):
        _ = [event async for event in client.generate(RawPrompt("a"), GO_ON)]
