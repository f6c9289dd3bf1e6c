"""Follows a reply to its end, where its answer and strict calls are checked by their schemas."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Mapping
from dataclasses import replace
from typing import Any

from nanorun.chat.schema.checking import check_answer, check_value
from nanorun.chat.schema.document import read_schema_text
from nanorun.chat.schema.holding import Dropped, Holder
from nanorun.model.chat import Event, Finished, GenerateOptions, Notice, TextDelta, ToolCallDelta


class SchemaCheck:
    """The check of one reply.

    Args:
        options: What the reply was asked to be.

    Raises:
        UsageError: If a schema has no meaning, naming its tool.
    """

    def __init__(self, options: GenerateOptions) -> None:
        self._schema: Any = True
        self._answer: list[str] = []
        self._problems: list[str] = []
        self._tools: dict[str, Mapping[str, Any]] = {}
        self.dropped: list[Dropped] = []
        """What no grammar holds the reply to."""
        if options.grammar is not None and options.grammar.kind == "json_schema":
            self._schema = read_schema_text(options.grammar.text)
            self.dropped += Holder(self._schema).hold(self._schema, "$").dropped
        must_call = options.tool_choice == "required"
        for tool in options.tools:
            function = tool["function"]
            if must_call or function.get("strict"):
                self._tools[function["name"]] = function.get("parameters") or {}

    def take(self, event: Event) -> Event:
        """Note an event; the last one comes back with what the check says."""
        match event:
            case TextDelta(text):
                self._answer.append(text)
            case ToolCallDelta(call=call) if call.name in self._tools:
                problems = check_value(call.arguments, self._tools[call.name])
                self._problems += [f"{call.name}: {problem}" for problem in problems]
            case Finished(reason="stop" | "tool_calls"):
                text = "".join(self._answer).strip()
                if self._schema is not True and (text or event.reason == "stop"):
                    self._problems += check_answer(text, self._schema)
                if self._problems:
                    return replace(event, refusal=f"refused by check: {'; '.join(self._problems)}")
        return event


async def checked(
    events: AsyncIterable[Event | None], check: SchemaCheck
) -> AsyncGenerator[Event | None]:
    """The same events, after what no grammar holds; `Finished.refusal` says what is wrong."""
    for dropped in check.dropped:
        yield Notice(str(dropped))
    async for event in events:
        yield event if event is None else check.take(event)
