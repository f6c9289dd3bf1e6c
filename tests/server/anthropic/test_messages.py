from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from nanorun.errors import EngineDied
from nanorun.model.chat import (
    Finished,
    Message,
    TextDelta,
    ToolArguments,
    ToolCall,
    ToolCallBegun,
    ToolCallDelta,
)
from nanorun.model.think import HIGH, LOW, OFF, Think
from tests.server.conftest import Endpoint, named_events
from tests.support.fakes import reply

Make = Callable[..., Endpoint]
CALL = ToolCall("call_1", "add", {"a": 1, "b": "ü"})
TOOL = {"name": "add", "description": "adds", "input_schema": {"type": "object"}}
QUESTION = [{"role": "user", "content": "hi"}]


async def send(api: Endpoint, **fields: Any) -> httpx.Response:
    body = {"model": "pico", "max_tokens": 99, "messages": QUESTION, **fields}
    return await api.request("POST", "/v1/messages?beta=true", json=body)


async def stream(api: Endpoint, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, each of which is named as its data says."""
    response = await send(api, stream=True, **fields)
    assert response.status_code == 200, response.text
    return named_events(response.text)


def content_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks as a client puts them together."""
    blocks: list[dict[str, Any]] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(dict(event["content_block"]))
        if event["type"] == "content_block_delta":
            (field,) = event["delta"].keys() - {"type"}
            block = blocks[event["index"]]
            block[field] = block.get(field, "") + event["delta"][field]
    for block in blocks:
        if "partial_json" in block:
            block["input"] = json.loads(block.pop("partial_json"))
    return blocks


SCRIPTS = {
    "text": reply("the answer"),
    "thinking": reply("the answer", thinking="let me see"),
    "tool": reply(tool_calls=[CALL, ToolCall("call_2", "sub", {})], thinking="hm"),
    "pieces": [
        TextDelta("well"),
        ToolCallBegun(0, "call_1", "add"),
        ToolArguments(0, '{"a": 1'),
        ToolArguments(0, ', "b": "ü"}'),
        ToolCallDelta(0, CALL),
        Finished("tool_calls"),
    ],
}


@pytest.mark.parametrize("script", SCRIPTS)
async def test_stream_builds_the_whole_message(endpoint: Make, script: str) -> None:
    api = endpoint(SCRIPTS[script], SCRIPTS[script])
    whole = (await send(api)).json()
    events = await stream(api)
    assert content_of(events) == whole["content"]
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop")
    start, delta = events[0]["message"], events[-2]
    assert start["content"] == []
    assert start["usage"]["output_tokens"] == 0
    assert delta["delta"]["stop_reason"] == whole["stop_reason"]
    assert delta["usage"] == whole["usage"]
    assert start["id"] != whole["id"]


async def test_message_has_blocks_reason_and_usage(endpoint: Make) -> None:
    api = endpoint(reply("4", thinking="2+2", tool_calls=[CALL], cached_tokens=5))
    body = (await send(api)).json()
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "pico")
    assert body["stop_reason"] == "tool_use"
    assert [block["type"] for block in body["content"]] == ["thinking", "text", "tool_use"]
    assert body["content"][2]["input"] == CALL.arguments
    assert body["usage"]["cache_read_input_tokens"] == 5
    assert body["usage"]["input_tokens"] == 2


@pytest.mark.parametrize(
    ("finished", "reason", "sequence"),
    [
        (Finished("stop"), "end_turn", None),
        (Finished("length"), "max_tokens", None),
        (Finished("stop", stop_text="END"), "stop_sequence", "END"),
        (Finished("tool_calls"), "end_turn", None),
    ],
)
async def test_reason_is_in_anthropics_words(
    endpoint: Make, finished: Finished, reason: str, sequence: str | None
) -> None:
    body = (await send(endpoint([TextDelta("x"), finished]))).json()
    assert (body["stop_reason"], body["stop_sequence"]) == (reason, sequence)


async def asked(endpoint: Make, **fields: Any) -> Any:
    api = endpoint(reply("x"), think=LOW)
    response = await send(api, **fields)
    assert response.status_code == 200, response.text
    return api.client.last


@pytest.mark.parametrize(
    ("fields", "think"),
    [
        ({}, LOW),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, Think(2000)),
        ({"thinking": {"type": "adaptive"}}, LOW),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}, HIGH),
        ({"thinking": {"type": "disabled"}}, OFF),
        ({"output_config": {"effort": "high"}}, HIGH),
    ],
)
async def test_thinking_and_effort_steer_the_dial(
    endpoint: Make, fields: dict[str, Any], think: Think
) -> None:
    assert (await asked(endpoint, **fields)).options.think == think


async def test_thinking_that_is_not_to_be_shown_stays_here(endpoint: Make) -> None:
    api = endpoint(SCRIPTS["thinking"], SCRIPTS["thinking"])
    fields = {"thinking": {"type": "adaptive", "display": "omitted"}}
    assert [block["type"] for block in (await send(api, **fields)).json()["content"]] == ["text"]
    assert [b["type"] for b in content_of(await stream(api, **fields))] == ["text"]


async def test_tools_are_offered_and_the_vendors_own_only_listed(endpoint: Make) -> None:
    api = endpoint(reply("x"))
    search = {"type": "web_search_20250305", "name": "web_search"}
    tools = [{**TOOL, "defer_loading": True, "cache_control": {"type": "ephemeral"}}, search]
    body = (await send(api, tools=tools, tool_choice={"type": "any"})).json()
    options = api.client.last.options
    function = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
    assert options.tools == ({"type": "function", "function": function},)
    assert options.tool_choice == "required"
    assert "web_search" in body["notices"][0]


async def test_one_tool_and_one_call_may_be_demanded(endpoint: Make) -> None:
    other = {**TOOL, "name": "sub"}
    choice = {"type": "tool", "name": "sub", "disable_parallel_tool_use": True}
    options = (await asked(endpoint, tools=[TOOL, other], tool_choice=choice)).options
    assert [tool["function"]["name"] for tool in options.tools] == ["sub"]
    assert (options.tool_choice, options.parallel_tool_calls) == ("required", False)


async def test_conversation_comes_back_as_it_was(endpoint: Make) -> None:
    messages = [
        *QUESTION,
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "redacted_thinking", "data": "xyz"},
            {"type": "text", "text": "\n"},
            {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": [
                {"type": "text", "text": "3"}]},
            {"type": "tool_result", "tool_use_id": "c2", "content": "no", "is_error": True},
            {"type": "text", "text": "go on", "cache_control": {"type": "ephemeral"}},
        ]},
    ]  # fmt: skip
    request = await asked(endpoint, messages=messages)
    assert request.messages == (
        Message("user", "hi"),
        Message("assistant", "", "hm", (ToolCall("c1", "add", {"a": 1}),)),
        Message("tool", "3", tool_call_id="c1"),
        Message("tool", '{"error": "no"}', tool_call_id="c2"),
        Message("user", "go on"),
    )
    assert request.options.echo_thinking is True


async def test_system_texts_before_the_first_reply_are_joined_in_front(endpoint: Make) -> None:
    late = {"role": "system", "content": [{"type": "text", "text": "late"}]}
    system = [
        {
            "type": "text",
            "text": "x-anthropic-billing-header: cc_version=1.2.3; cc_entrypoint=cli;",
        },
        {"type": "text", "text": "one"},
        {"type": "text", "text": "two"},
    ]
    api = endpoint(reply("x"), reply("y"))
    body = (await send(api, system=system, messages=[*QUESTION, late])).json()
    first = api.client.last.messages
    assert first == (Message("system", "one\n\ntwo\n\nlate"), Message("user", "hi"))
    assert "bookkeeping" in body["notices"][0]
    later = {"role": "system", "content": "later"}
    turn = [*QUESTION, {"role": "system", "content": "late"},
            {"role": "assistant", "content": "x"}, later, *QUESTION]  # fmt: skip
    await send(api, system=system, messages=turn)
    assert api.client.last.messages[:2] == first
    assert api.client.last.messages[3] == Message("system", "later")


async def test_same_text_is_the_same_message_in_either_form(endpoint: Make) -> None:
    blocks = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert (await asked(endpoint, messages=blocks, system="s")).messages == (
        await asked(endpoint, system=[{"type": "text", "text": "s"}])
    ).messages


async def test_fields_of_claude_code_are_taken(endpoint: Make) -> None:
    request = await asked(
        endpoint,
        metadata={"user_id": "x"},
        context_management={"edits": []},
        betas=["a"],
        service_tier="auto",
        stop_sequences=["END"],
        top_k=-1,
        max_tokens=32000,
    )
    assert (request.options.stop, request.options.top_k, request.options.max_tokens) == (
        ("END",), 0, 32000,
    )  # fmt: skip


async def test_format_holds_the_answer(endpoint: Make) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    config = {"format": {"type": "json_schema", "schema": schema}}
    request = await asked(endpoint, output_config=config)
    assert json.loads(request.options.grammar.text) == schema


async def test_unknown_field_is_told(endpoint: Make) -> None:
    body = (await send(endpoint(reply("x")), brand_new=1)).json()
    assert "brand_new" in body["notices"][0]


@pytest.mark.parametrize(
    ("fields", "status", "kind"),
    [
        ({"messages": []}, 400, "invalid_request_error"),
        ({"max_tokens": 0}, 400, "invalid_request_error"),
        ({"mcp_servers": [{"url": "x"}]}, 400, "invalid_request_error"),
        ({"thinking": {"type": "sometimes"}}, 400, "invalid_request_error"),
        ({"output_config": {"effort": "much"}}, 400, "invalid_request_error"),
        ({"tool_choice": {"type": "tool", "name": "fly"}}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400,
         "invalid_request_error"),
        ({"model": "claude"}, 404, "not_found_error"),
    ],
)  # fmt: skip
async def test_errors_are_anthropics(
    endpoint: Make, fields: dict[str, Any], status: int, kind: str
) -> None:
    response = await send(endpoint(), **fields)
    assert response.status_code == status
    body = response.json()
    assert (body["type"], body["error"]["type"]) == ("error", kind)


async def test_failure_within_a_stream_is_an_error_event(endpoint: Make) -> None:
    events = await stream(endpoint([TextDelta("so far"), EngineDied("it died")]))
    assert content_of(events) == [{"type": "text", "text": "so far"}]
    assert (events[-1]["type"], events[-1]["error"]["type"]) == ("error", "overloaded_error")


async def test_silence_is_filled_with_pings(endpoint: Make) -> None:
    events = await stream(endpoint([0.3, *reply("x")], keepalive_s=0.05))
    assert {"type": "ping"} in events
    assert content_of(events) == [{"type": "text", "text": "x"}]


async def test_either_header_may_bear_the_key(endpoint: Make) -> None:
    api = endpoint(reply("x"), reply("x"), api_keys=("secret",))
    body = {"max_tokens": 9, "messages": QUESTION}
    for headers in ({"x-api-key": "secret"}, {"authorization": "Bearer secret"}):
        response = await api.request("POST", "/v1/messages", json=body, headers=headers)
        assert response.status_code == 200
    response = await api.request("POST", "/v1/messages", json=body, headers={"x-api-key": "no"})
    assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")


@pytest.mark.parametrize("path", ["/", "/api/hello"])
async def test_look_whether_somebody_is_here_is_answered(endpoint: Make, path: str) -> None:
    assert (await endpoint().request("HEAD", path)).status_code == 200
