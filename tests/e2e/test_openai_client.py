"""The official client against an endpoint on a real socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from nanorun.errors import ContextFull, EngineDied
from nanorun.model.chat import PrefillProgress, TextDelta, ToolCall
from nanorun.model.think import HIGH
from tests.e2e.conftest import Live
from tests.support.fakes import reply
from tests.support.waiting import PATIENCE_S

Start = Callable[..., Live]
MESSAGES: Any = [{"role": "user", "content": "2+2?"}]


@contextmanager
def client_of(live: Live, key: str = "none") -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url, api_key=key, max_retries=0, timeout=PATIENCE_S) as client:
        yield client


def test_client_gets_a_completion(live: Start) -> None:
    endpoint = live(reply("it is 4", thinking="two and two", cached_tokens=3))
    with client_of(endpoint) as client:
        completion = client.chat.completions.create(
            model="pico", messages=MESSAGES, reasoning_effort="high", seed=1, max_tokens=50
        )
    choice = completion.choices[0]
    message: Any = choice.message
    assert (choice.finish_reason, message.content) == ("stop", "it is 4")
    assert message.reasoning == "two and two"
    usage: Any = completion.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens == 13
    assert usage.prompt_tokens_details.cached_tokens == 3
    assert usage.completion_tokens_details.reasoning_tokens == 3
    assert endpoint.client.last.options.think == HIGH


def test_client_streams_reasoning_and_usage(live: Start) -> None:
    script = [PrefillProgress(1, 7, 0), 0.1, *reply("it is 4", thinking="two and two")]
    with client_of(live(script, keepalive_s=0.02)) as client:
        chunks = list(
            client.chat.completions.create(
                model="pico",
                messages=MESSAGES,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"reasoning_budget": 5},
            )
        )
    deltas: list[Any] = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == "it is 4"
    thinking = [d.reasoning for d in deltas if hasattr(d, "reasoning")]
    assert "".join(thinking) == "two and two"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    usage: Any = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (7, 6)


def test_client_passes_tools_and_their_results(live: Start) -> None:
    call = ToolCall("call_1", "add", {"a": 2, "b": 2})
    endpoint = live(reply(tool_calls=[call]), reply("it is 4"))
    function: Any = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    tools: Any = [{"type": "function", "function": function}]
    with client_of(endpoint) as client:
        create = client.chat.completions.create
        first = create(model="pico", messages=MESSAGES, tools=tools).choices[0]
        assert first.finish_reason == "tool_calls"
        result = {"role": "tool", "tool_call_id": "call_1", "content": "4"}
        messages = [*MESSAGES, first.message, result]
        second = create(model="pico", messages=messages, tools=tools).choices[0]
    assert second.message.content == "it is 4"
    _, assistant, tool = endpoint.client.last.messages
    assert assistant.tool_calls == (call,)
    assert (tool.role, tool.content, tool.tool_call_id) == ("tool", "4", "call_1")


def test_client_gathers_a_streamed_tool_call(live: Start) -> None:
    call = ToolCall("call_1", "add", {"a": 2})
    with (
        client_of(live(reply(tool_calls=[call]))) as client,
        client.chat.completions.stream(model="pico", messages=MESSAGES) as stream,
    ):
        final = stream.get_final_completion()
    calls: Any = final.choices[0].message.tool_calls
    assert [(c.id, c.function.arguments) for c in calls] == [("call_1", '{"a": 2}')]


def test_client_lists_models(live: Start) -> None:
    with client_of(live(reply())) as client:
        assert [model.id for model in client.models.list()] == ["pico"]
        assert client.models.retrieve("pico").id == "pico"


def test_client_raises_its_own_errors(live: Start) -> None:
    endpoint = live([ContextFull("9000 tokens do not fit 8192")], [EngineDied("it died")])
    with client_of(endpoint) as client:
        create = client.chat.completions.create
        with pytest.raises(openai.BadRequestError) as full:
            create(model="pico", messages=MESSAGES)
        assert full.value.code == "context_length_exceeded"
        with pytest.raises(openai.InternalServerError, match="it died"):
            create(model="pico", messages=MESSAGES)
        with pytest.raises(openai.NotFoundError):
            create(model="gpt-5", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError) as spoken:
            create(model="pico", messages=MESSAGES, modalities=["audio"])
        assert spoken.value.param == "modalities"


def test_client_raises_when_a_stream_fails_midway(live: Start) -> None:
    endpoint = live([TextDelta("so far"), EngineDied("it died")])
    seen = ""
    with client_of(endpoint) as client:
        stream = client.chat.completions.create(model="pico", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="it died"):
            for chunk in stream:
                seen += chunk.choices[0].delta.content or ""
    assert seen == "so far"


def test_client_needs_the_right_key(live: Start) -> None:
    endpoint = live(reply("hello"), api_keys=("secret",))
    with client_of(endpoint, "wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with client_of(endpoint, "secret") as client:
        assert client.models.list().data
