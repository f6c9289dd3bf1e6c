"""Replies that follow a grammar, made by the real engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nanorun.errors import UsageError
from nanorun.model.chat import (
    Event,
    Finished,
    GenerateOptions,
    Grammar,
    Message,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
)
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import MAX, OFF, Think
from nanorun.runtime.client import EngineClient
from tests.runtime.schemas import SCHEMAS
from tests.support.waiting import PATIENCE_S

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}, "digits": {"type": "integer"}},
            "required": ["expression", "digits"],
        },
    },
}


@pytest.fixture
async def client(pico_gguf: Path) -> AsyncIterator[EngineClient]:
    client = EngineClient(pico_gguf, EngineOptions(n_ctx=8192, n_parallel=8, n_threads=1))
    yield client
    await client.close()


async def collect(client: EngineClient, text: str, options: GenerateOptions) -> list[Event]:
    return [event async for event in client.generate([Message("user", text)], options)]


def answer_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def schema_of(schema: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


async def check_schemas(client: EngineClient, n_each: int) -> None:
    async def one(schema: dict[str, Any], seed: int) -> None:
        options = GenerateOptions(
            think=OFF if seed % 2 else Think(16), temperature=1.5, seed=seed, max_tokens=1500,
            grammar=schema_of(schema),
        )  # fmt: skip
        events = await collect(client, f"Reply in JSON: name fox, age {seed}", options)
        assert isinstance(events[-1], Finished)
        assert events[-1].reason == "stop", (schema, answer_of(events))
        jsonschema.validate(
            json.loads(answer_of(events)), schema,
            format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
        )  # fmt: skip

    await asyncio.gather(*(one(schema, seed) for schema in SCHEMAS for seed in range(n_each)))


async def test_answers_fit_their_schema(client: EngineClient) -> None:
    await check_schemas(client, n_each=2)


@pytest.mark.slow
async def test_three_hundred_answers_fit_their_schema(client: EngineClient) -> None:
    assert len(SCHEMAS) == 30
    await check_schemas(client, n_each=10)


async def test_thinking_is_free_and_only_the_answer_is_held(client: EngineClient) -> None:
    options = GenerateOptions(think=MAX, temperature=0, grammar=Grammar("regex", "[xyz]{3}"))
    events = await collect(client, "What is 47 + 86?", options)
    thinking = "".join(event.text for event in events if isinstance(event, ThinkingDelta))
    assert thinking.startswith("7+6+0=13")
    answer = answer_of(events)
    assert len(answer) == 3 and set(answer) <= set("xyz")


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (schema_of({"type": "frob"}), '$: type is "frob"'),
        (schema_of({"$ref": "#/nowhere"}), "$ref '#/nowhere' is not in the schema"),
        (schema_of({"type": "string", "pattern": "(?<=a"}), "the pattern '(?<=a' cannot be used"),
        (Grammar("json_schema", "{not json"), "the schema is not JSON"),
        (Grammar("regex", "([a"), "grammar"),
        (Grammar("lark", "start: undefined_rule"), "grammar"),
        (Grammar("regex", "a" * 600_000), "grammar"),
        (Grammar("regex", "(a{1000}){1000}"), "grammar"),  # too deep for the usual stack
    ],
)
async def test_grammar_without_meaning_is_refused(
    client: EngineClient, grammar: Grammar, said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        await collect(client, "Hello", GenerateOptions(think=OFF, grammar=grammar))
    assert said in caught.value.message
    events = await collect(client, "What is 4785 + 697?", GenerateOptions())
    assert answer_of(events) == "5482"  # the engine is well


@pytest.mark.parametrize("think", ["off", "low"])
async def test_required_call_is_made_and_fits_the_tool(client: EngineClient, think: str) -> None:
    options = GenerateOptions(
        think=Think.parse(think),
        tools=(CALCULATOR,),
        tool_choice="required",
        parallel_tool_calls=False,
    )
    events = await collect(client, "Hello", options)
    (call,) = [event for event in events if isinstance(event, ToolCallDelta)]
    assert (call.call.name, call.problem) == ("calculator", None)
    assert isinstance(call.call.arguments["digits"], int)
    assert isinstance(events[-1], Finished) and events[-1].reason == "tool_calls"


async def test_required_call_without_tools_is_refused(client: EngineClient) -> None:
    with pytest.raises(UsageError, match="there are no tools"):
        await collect(client, "Hello", GenerateOptions(tool_choice="required"))


@pytest.mark.parametrize(
    "schema",
    [{"properties": [1]}, {"required": [{}]}, {"properties": {"a": {"anyOf": 7}}}],
)
async def test_required_call_of_a_tool_with_an_odd_schema_does_not_hang(
    client: EngineClient, schema: dict[str, Any]
) -> None:
    tool = {"type": "function", "function": {"name": "odd", "parameters": schema}}
    options = GenerateOptions(think=OFF, tools=(tool,), tool_choice="required", max_tokens=50)
    with contextlib.suppress(UsageError):
        await asyncio.wait_for(collect(client, "Hello", options), PATIENCE_S)


async def test_strict_tool_leaves_answers_free_and_holds_calls(client: EngineClient) -> None:
    strict = {"type": "function", "function": {**CALCULATOR["function"], "strict": True}}
    options = GenerateOptions(think=OFF, temperature=0, tools=(strict,))
    events = await collect(client, "What is 12 * 34?", options)
    (call,) = [event for event in events if isinstance(event, ToolCallDelta)]
    # Pico was never shown `digits`: only the grammar makes it say them.
    assert call.problem is None and isinstance(call.call.arguments["digits"], int)
    events = await collect(client, "What is 47 + 86?", GenerateOptions(tools=(strict,), seed=1))
    assert answer_of(events)


async def test_cancelled_while_its_grammar_is_compiled(client: EngineClient) -> None:
    big = {"type": "object", "properties": {f"p{i}": SCHEMAS[i % 30] for i in range(200)}}
    generation = client.generate(
        [Message("user", "Hello")],
        GenerateOptions(think=OFF, grammar=schema_of(big)),
    )
    waiting = asyncio.create_task(anext(aiter(generation)))
    await client.start()
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await generation.aclose()
    stats = await client.stats()
    while stats.n_running + stats.n_waiting:  # what never ends is cut off by pytest-timeout
        stats = await client.stats()


async def test_grammar_that_no_text_fits_is_said_in_plain_words(client: EngineClient) -> None:
    options = GenerateOptions(think=OFF, grammar=Grammar("regex", r"[^\s\S]"))
    with pytest.raises(UsageError) as caught:
        await collect(client, "Hello", options)
    assert caught.value.facts == ("nothing that fits can follow",)


async def test_guessing_under_a_grammar_says_the_same_sooner(pico_gguf: Path) -> None:
    """What a schema prescribes is guessed, and checked in batches of several tokens."""
    schema = {
        "type": "object",
        "properties": {"favourite_colour": {"enum": ["red", "blue"]}, "age": {"type": "integer"}},
        "required": ["favourite_colour", "age"],
        "additionalProperties": False,
    }
    said, usages = [], []
    for speculation in ("off", "lookup"):
        options = EngineOptions(n_ctx=2048, n_threads=1, speculation=speculation, n_draft=8)
        client = EngineClient(pico_gguf, options)
        events = await collect(
            client, "Reply in JSON: favourite colour red, age 7",
            GenerateOptions(think=OFF, temperature=0, max_tokens=200, grammar=schema_of(schema)),
        )  # fmt: skip
        await client.close()
        said.append(answer_of(events))
        assert isinstance(events[-1], Finished)
        usages.append(events[-1].usage)
    jsonschema.validate(json.loads(said[0]), schema)
    assert said[0] == said[1]
    assert usages[0].completion_tokens == usages[1].completion_tokens
    assert usages[1].accepted_tokens >= usages[1].completion_tokens // 3
