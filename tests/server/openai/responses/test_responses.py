from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

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
from nanorun.model.think import HIGH, Think
from tests.server.conftest import Endpoint, error_of, named_events
from tests.support.fakes import FakeClient, reply

Make = Callable[..., Endpoint]
CALL = ToolCall("call_1", "add", {"a": 1, "b": "ü"})
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": None}
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


async def send(api: Endpoint, asked: Any = "hi", **fields: Any) -> httpx.Response:
    body = {"model": "pico", "input": asked, **fields}
    return await api.request("POST", "/v1/responses", json=body)


async def answer(api: Endpoint, asked: Any = "hi", **fields: Any) -> dict[str, Any]:
    response = await send(api, asked, **fields)
    assert response.status_code == 200, response.text
    made: dict[str, Any] = response.json()
    Response.model_validate(made)  # as the SDK reads it, but strictly
    return made


async def stream(api: Endpoint, asked: Any = "hi", **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream: named, numbered, and each as OpenAI's SDK types it."""
    response = await send(api, asked, stream=True, **fields)
    assert response.status_code == 200, response.text
    events = named_events(response.text)
    for event in events:
        EVENTS.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def without_ids(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in item.items() if key != "id"} for item in output]


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
@pytest.mark.parametrize("asks", [{}, {"reasoning": {"summary": "auto"}},
                                  {"include": ["reasoning.encrypted_content"]}])  # fmt: skip
async def test_stream_builds_what_the_whole_answer_is(
    endpoint: Make, script: str, asks: dict[str, Any]
) -> None:
    whole = await answer(endpoint(SCRIPTS[script]), **asks)
    events = await stream(endpoint(SCRIPTS[script]), **asks)
    assert kinds(events)[:2] == ["created", "in_progress"]
    assert kinds(events)[-1] == "completed"
    last = events[-1]["response"]
    assert without_ids(last["output"]) == without_ids(whole["output"])
    done = [event["item"] for event in events if event["type"].endswith("output_item.done")]
    assert done == last["output"]  # codex reads these only
    for name in ("output_text", "reasoning_text", "reasoning_summary_text",
                 "function_call_arguments"):  # fmt: skip
        for i, item in enumerate(last["output"]):
            told = [e["delta"] for e in events if e["type"] == f"response.{name}.delta"
                    and e["output_index"] == i and e["item_id"] == item["id"]]  # fmt: skip
            key = "arguments" if name == "function_call_arguments" else "text"
            ends = [e[key] for e in events if e["type"] == f"response.{name}.done"
                    and e["output_index"] == i]  # fmt: skip
            assert ["".join(told)] == ends if told else ends in ([], ["{}"])


async def test_events_come_in_openais_order(endpoint: Make) -> None:
    events = await stream(endpoint(SCRIPTS["thinking"]))
    assert [kind for kind in kinds(events) if not kind.endswith("delta")] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", "content_part.added", "output_text.done", "content_part.done",
        "output_item.done",
        "completed",
    ]  # fmt: skip


async def test_conversation_goes_on_by_the_previous_response(endpoint: Make) -> None:
    api = endpoint(reply("one", thinking="hm"), reply("two"), reply("three"))
    first = await answer(api, "a", instructions="be short")
    second = await answer(api, "b", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    assert api.client.last.messages == (
        Message("user", "a"), Message("assistant", "one", "hm"), Message("user", "b"),
    )  # fmt: skip
    events = await stream(api, "c", previous_response_id=second["id"], instructions="be long")
    assert api.client.last.messages[0] == Message("system", "be long")
    assert [m.content for m in api.client.last.messages[1:]] == ["a", "one", "b", "two", "c"]
    streamed = events[-1]["response"]
    assert (await api.request("GET", f"/v1/responses/{streamed['id']}")).json() == streamed


async def test_responses_outlive_the_server(endpoint: Make, tmp_path: Any) -> None:
    file = tmp_path / "r.sqlite3"
    first = await answer(endpoint(reply("one"), responses_file=file), "a")
    api = endpoint(reply("two"), responses_file=file)
    await answer(api, "b", previous_response_id=first["id"])
    assert [m.content for m in api.client.last.messages] == ["a", "one", "b"]


async def test_item_is_found_by_reference(endpoint: Make) -> None:
    """AI SDK refers to what it was sent instead of sending it again."""
    api = endpoint(reply("one", thinking="hm"))
    first = await answer(api, "a")
    references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    await answer(api, [{"role": "user", "content": "a"}, *references,
                       {"role": "user", "content": "b"}])  # fmt: skip
    assert api.client.last.messages[1] == Message("assistant", "one", "hm")
    response = await send(api, [{"type": "item_reference", "id": "msg_x"}])
    assert response.status_code == 400
    assert "there is no item 'msg_x'" in error_of(response)["message"]


async def test_what_shall_not_be_stored_is_not(endpoint: Make) -> None:
    api = endpoint()
    made = await answer(api, store=False)
    assert made["store"] is False
    assert (await api.request("GET", f"/v1/responses/{made['id']}")).status_code == 404
    response = await send(api, previous_response_id=made["id"])
    assert response.status_code == 400
    error = error_of(response)
    assert error["code"] == "previous_response_not_found"
    assert "send the whole conversation" in error["message"]


async def test_response_is_forgotten_on_request(endpoint: Make) -> None:
    api = endpoint()
    path = f"/v1/responses/{(await answer(api))['id']}"
    assert (await api.request("DELETE", path)).json()["deleted"] is True
    for method in ("GET", "DELETE"):
        assert (await api.request(method, path)).status_code == 404
    assert (await api.request("GET", f"{path}/input_items")).status_code == 404


async def test_input_items_come_in_pages(endpoint: Make) -> None:
    api = endpoint()
    asked = [{"role": "user", "content": str(i)} for i in range(5)]
    path = f"/v1/responses/{(await answer(api, asked))['id']}/input_items"
    texts, after = [], None
    for _ in range(3):
        query = {"limit": 2, "order": "asc", **({"after": after} if after else {})}
        page = (await api.request("GET", path, params=query)).json()
        texts += [item["content"][0]["text"] for item in page["data"]]
        after = page["last_id"]
    assert texts == ["0", "1", "2", "3", "4"]
    assert page["has_more"] is False
    newest = (await api.request("GET", path)).json()["data"][0]
    assert newest["content"] == [{"type": "input_text", "text": "4"}]


async def test_sealed_reasoning_comes_back_usable(endpoint: Make) -> None:
    """Codex: nothing stored, the reasoning item is sent back as it came."""
    api = endpoint(reply(thinking="hm ü", tool_calls=[CALL]), reply("done"))
    asks = {"store": False, "include": ["reasoning.encrypted_content"]}
    first = await answer(api, [{"role": "user", "content": "a"}], **asks)
    reasoning = first["output"][0]
    assert reasoning["type"] == "reasoning"
    del reasoning["content"]
    output = {"type": "function_call_output", "call_id": "call_1", "output": "3"}
    await answer(api, [{"role": "user", "content": "a"}, *first["output"], output], **asks)
    assert api.client.last.messages[1:] == (
        Message("assistant", "", "hm ü", (CALL,)), Message("tool", "3", tool_call_id="call_1"),
    )  # fmt: skip
    assert api.client.last.options.echo_thinking is True


async def test_thinking_stands_in_one_place(endpoint: Make) -> None:
    api = endpoint(reply("x", thinking="hm"))
    plain = (await answer(api))["output"][0]
    assert (plain["content"][0]["text"], plain["summary"]) == ("hm", [])
    summed = (await answer(api, reasoning={"effort": "high", "summary": "auto"}))["output"][0]
    assert (summed["content"], summed["summary"][0]["text"]) == ([], "hm")
    assert api.client.last.options.think == HIGH


async def test_namespaces_and_custom_tools_are_called_by_their_own_names(endpoint: Make) -> None:
    tools = [
        {
            "type": "namespace",
            "name": "files",
            "description": "",
            "tools": [{**TOOL, "name": "ls"}],
        },
        {"type": "custom", "name": "patch", "format": {"type": "text"}},
        {"type": "web_search"},
        TOOL,
    ]
    calls = [ToolCall("c1", "files.ls", {"x": 1}), ToolCall("c2", "patch", {"input": "*** ü"})]
    for made in (
        await answer(endpoint(reply(tool_calls=calls)), tools=tools),
        (await stream(endpoint(reply(tool_calls=calls)), tools=tools))[-1]["response"],
    ):
        listing, patch = without_ids(made["output"])
        assert listing == {
            "type": "function_call", "call_id": "c1", "name": "ls", "namespace": "files",
            "arguments": '{"x": 1}', "status": "completed",
        }  # fmt: skip
        assert patch == {"type": "custom_tool_call", "call_id": "c2", "name": "patch",
                         "input": "*** ü", "status": "completed"}  # fmt: skip
        assert made["notices"] == ["the tool web_search is the vendor's own and is never called"]
    api = endpoint()
    await answer(api, tools=tools)
    offered = [tool["function"]["name"] for tool in api.client.last.options.tools]
    assert offered == ["files.ls", "patch", "add"]


async def test_call_that_broke_off_is_not_told_as_done(endpoint: Make) -> None:
    script = [ToolCallBegun(0, "call_1", "add"), ToolArguments(0, '{"a'), Finished("length")]
    events = await stream(endpoint(script), tools=[TOOL])
    assert kinds(events)[-1] == "incomplete"
    assert "output_item.done" not in kinds(events)
    last = events[-1]["response"]
    assert (last["status"], last["output"]) == ("incomplete", [])
    assert last["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["notices"] == ["a call of add broke off and was left out"]


async def test_answer_that_its_check_refuses_has_a_part_that_says_so(endpoint: Make) -> None:
    script = [TextDelta("{}"), Finished("stop", refusal="refused by check: no")]
    for made in (
        await answer(endpoint(script)), (await stream(endpoint(script)))[-1]["response"],
    ):  # fmt: skip
        (message,) = made["output"]
        assert [part["type"] for part in message["content"]] == ["output_text", "refusal"]


async def test_logprobs_stand_with_their_text(endpoint: Make) -> None:
    from nanorun.model.chat import TokenLogprobs

    script = [TokenLogprobs(b"a", -0.5, ((b"a", -0.5),)), TextDelta("a"), Finished("stop")]
    api = endpoint(script)
    made = await answer(api, include=["message.output_text.logprobs"], top_logprobs=1)
    (token,) = made["output"][0]["content"][0]["logprobs"]
    assert (token["token"], token["logprob"], len(token["top_logprobs"])) == ("a", -0.5, 1)
    assert api.client.last.options.logprobs == 1


async def test_schema_of_text_format_holds_the_answer(endpoint: Make) -> None:
    api = endpoint(reply('{"a": 1}'))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "x", "strict": True, "schema": schema}
    await answer(api, text={"format": form, "verbosity": "low"})
    grammar = api.client.last.options.grammar
    assert grammar is not None
    assert json.loads(grammar.text) == schema
    response = await send(api, text={"format": {"type": "json_schema", "shema": schema}})
    assert response.status_code == 400
    assert error_of(response)["param"] == "text.format"


async def test_failure_within_a_stream_is_an_event(endpoint: Make) -> None:
    events = await stream(endpoint([TextDelta("a"), EngineDied("it died")]))
    assert kinds(events)[-1] == "failed"
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    assert "it died" in failed["error"]["message"]


async def test_failure_before_a_stream_is_a_status(endpoint: Make) -> None:
    response = await send(endpoint([EngineDied("it died")]), stream=True)
    assert response.status_code == 503


async def poll(api: Endpoint, path: str, status: str) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while True:
            made: dict[str, Any] = (await api.request("GET", path)).json()
            if made["status"] != "in_progress":
                assert made["status"] == status
                return made
            await asyncio.sleep(0.005)


async def test_response_in_the_background_is_asked_for(endpoint: Make) -> None:
    api = endpoint(reply("later"))
    begun = await answer(api, background=True)
    assert (begun["status"], begun["output"]) == ("in_progress", [])
    made = await poll(api, f"/v1/responses/{begun['id']}", "completed")
    assert made["output"][0]["content"][0]["text"] == "later"
    await answer(api, "b", previous_response_id=begun["id"])
    assert [m.content for m in api.client.last.messages] == ["hi", "later", "b"]


async def test_response_in_the_background_is_cancelled(endpoint: Make) -> None:
    api = endpoint([TextDelta("a"), 60.0, Finished("stop")])
    path = f"/v1/responses/{(await answer(api, background=True))['id']}"
    async with asyncio.timeout(30):
        while not api.client.requests:
            await asyncio.sleep(0.005)
    await api.request("POST", f"{path}/cancel")
    await poll(api, path, "cancelled")


async def test_failure_in_the_background_is_kept(endpoint: Make) -> None:
    api = endpoint([EngineDied("it died")])
    path = f"/v1/responses/{(await answer(api, background=True))['id']}"
    assert "it died" in (await poll(api, path, "failed"))["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"background": True, "stream": True}, "background"),
        ({"background": True, "store": False}, "background"),
        ({"reasoning": {"effort": "very"}}, "reasoning.effort"),
        ({"input": []}, "nothing to answer"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "none of the tools"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "cannot be offered"),
        ({"suffix": "x"}, "suffix"),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(
    endpoint: Make, fields: dict[str, Any], text: str
) -> None:
    response = await send(endpoint(), **{"asked": fields.pop("input", "hi"), **fields})
    assert response.status_code == 400
    assert text in error_of(response)["message"]


async def test_fields_of_real_clients_are_taken(endpoint: Make) -> None:
    api = endpoint()
    await answer(
        api, truncation="auto", metadata={"a": "b"}, prompt_cache_key="k", user="u",
        client_metadata={"x": 1}, stream_options={"include_obfuscation": False}, max_tool_calls=5,
        reasoning={"effort": "minimal", "summary": None}, service_tier="auto", tool_choice="auto",
        tools=[], parallel_tool_calls=True, temperature=0.5, top_k=3, seed=1, safety_identifier="s",
    )  # fmt: skip
    options = api.client.last.options
    assert (options.temperature, options.top_k, options.seed) == (0.5, 3, 1)
    assert options.think == Think(128)


async def test_full_queue_refuses_the_background_at_once() -> None:
    from nanorun.server.settings import ServerSettings

    client = FakeClient.playing([TextDelta("a"), 60.0, Finished("stop")])
    api = Endpoint(client, ServerSettings(n_parallel=1, max_queued=0))
    await answer(api, background=True)
    async with asyncio.timeout(30):
        while not client.requests:
            await asyncio.sleep(0.005)
    assert (await send(api, background=True)).status_code == 429
