"""What a reply's last event says of its schema."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from nanorun.chat.schema.following import SchemaCheck, checked
from nanorun.model.chat import (
    Event,
    Finished,
    GenerateOptions,
    Grammar,
    Notice,
    TextDelta,
    ToolCall,
    ToolCallDelta,
)

DIFFERENT = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}


async def follow(options: GenerateOptions, *events: Event) -> list[Any]:
    async def source() -> AsyncIterator[Event]:
        for event in events:
            yield event

    return [event async for event in checked(source(), SchemaCheck(options))]


def options_for(schema: Any) -> GenerateOptions:
    return GenerateOptions(grammar=Grammar("json_schema", json.dumps(schema)))


async def test_refused_answer_is_told_after_a_notice() -> None:
    events = await follow(
        options_for(DIFFERENT), TextDelta("[1, "), TextDelta("1]"), Finished("stop")
    )
    assert isinstance(events[0], Notice) and "uniqueItems" in events[0].text
    assert events[-1].refusal.startswith("refused by check: $: ")


async def test_fitting_and_cut_answers_are_not_refused() -> None:
    for text, reason in (("[1, 2]", "stop"), ("[1, 1", "length")):
        finished = Finished(reason)  # type: ignore[arg-type]
        assert (await follow(options_for(DIFFERENT), TextDelta(text), finished))[-1] == finished


async def test_arguments_of_strict_tools_are_checked() -> None:
    function = {"name": "f", "parameters": {"properties": {"a": DIFFERENT}}, "strict": True}
    options = GenerateOptions(tools=({"type": "function", "function": function},))
    call = ToolCallDelta(0, ToolCall("1", "f", {"a": [1, 1]}))
    events = await follow(options, call, Finished("tool_calls"))
    assert events[-1].refusal.startswith("refused by check: f: $.a: ")
