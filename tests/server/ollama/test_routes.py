from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from nanorun.errors import EngineDied
from nanorun.model.chat import Grammar, Message, RawPrompt, TextDelta, ToolCall
from nanorun.model.think import HIGH, LOW, OFF, Think
from tests.server.conftest import Endpoint
from tests.support.fakes import reply

Make = Callable[..., Endpoint]
CALL = ToolCall("call_1", "add", {"a": 1, "b": "ü"})
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
QUESTION = [{"role": "user", "content": "hi"}]


async def post(api: Endpoint, route: str, **body: Any) -> httpx.Response:
    return await api.request("POST", f"/api/{route}", json={"model": "pico", **body})


async def lines(api: Endpoint, route: str, **body: Any) -> list[dict[str, Any]]:
    response = await post(api, route, **body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


async def test_chat_streams_lines_unless_told_not_to(endpoint: Make) -> None:
    script = reply("the answer", thinking="let me see", tool_calls=[CALL])
    api = endpoint(script, script)
    *deltas, last = await lines(api, "chat", messages=QUESTION)
    whole = (await post(api, "chat", messages=QUESTION, stream=False)).json()
    messages = [line["message"] for line in deltas]
    assert "".join(m.get("thinking", "") for m in messages) == whole["message"]["thinking"]
    assert "".join(m["content"] for m in messages) == whole["message"]["content"] == "the answer"
    calls = [call for m in messages for call in m.get("tool_calls", ())]
    assert calls == whole["message"]["tool_calls"]
    assert calls[0]["function"] == {"name": "add", "arguments": {"a": 1, "b": "ü"}}
    assert not any(line["done"] for line in deltas)
    for end in (last, whole):
        assert (end["done"], end["done_reason"], end["model"]) == (True, "stop", "pico")
        assert end["eval_count"] > 0
        assert end["prompt_eval_count"] > 0


async def test_generate_gives_text(endpoint: Make) -> None:
    api = endpoint(reply("a b", thinking="hm"), reply("a b", reason="length"))
    *deltas, last = await lines(api, "generate", prompt="hi", system="be brief")
    assert "".join(line["response"] for line in deltas) == "a b"
    assert "".join(line.get("thinking", "") for line in deltas) == "hm"
    assert last["response"] == ""
    assert api.client.last.messages == (Message("system", "be brief"), Message("user", "hi"))
    whole = (await post(api, "generate", prompt="<raw>", raw=True, stream=False)).json()
    assert (whole["response"], whole["done_reason"]) == ("a b", "length")
    assert api.client.last.raw == RawPrompt(text="<raw>")


async def asked(endpoint: Make, **body: Any) -> Any:
    api = endpoint(reply("x"), think=LOW)
    response = await post(api, "chat", **{"messages": QUESTION, "stream": False, **body})
    assert response.status_code == 200, response.text
    return api.client.last


@pytest.mark.parametrize(
    ("think", "depth"),
    [(None, LOW), (True, LOW), (False, OFF), ("high", HIGH), ("max", Think(None, "max"))],
)
async def test_think_is_a_switch_or_a_level(endpoint: Make, think: Any, depth: Think) -> None:
    assert (await asked(endpoint, think=think)).options.think == depth


async def test_options_have_ollamas_names(endpoint: Make) -> None:
    options = {
        "temperature": 0.5, "top_k": -1, "top_p": 0.9, "min_p": 0.1, "seed": 7, "num_predict": 9,
        "repeat_penalty": 1.1, "repeat_last_n": 32, "stop": ["END"], "num_ctx": 4096,
        "mirostat": 0, "mirostat_tau": 5.0, "typical_p": 1.0, "num_gpu": 99,
    }  # fmt: skip
    made = (await asked(endpoint, options=options)).options
    assert (made.temperature, made.top_k, made.top_p, made.min_p) == (0.5, 0, 0.9, 0.1)
    assert (made.seed, made.max_tokens, made.stop) == (7, 9, ("END",))
    assert (made.repetition_penalty, made.penalty_last_n) == (1.1, 32)
    assert (await asked(endpoint, options={"num_predict": -1})).options.max_tokens is None
    assert (await asked(endpoint, options={"num_predict": -2})).options.max_tokens is None


@pytest.mark.parametrize("schema", ["json", {"type": "null"}])
async def test_format_holds_the_answer(endpoint: Make, schema: Any) -> None:
    text = '{"type": "object"}' if schema == "json" else json.dumps(schema)
    assert (await asked(endpoint, format=schema)).options.grammar == Grammar("json_schema", text)


async def test_conversation_with_calls_and_thinking_comes_back(endpoint: Make) -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_name": "add", "content": "3"},
    ]
    request = await asked(endpoint, messages=messages, tools=[TOOL])
    assert request.messages == (
        Message("user", "hi"),
        Message("assistant", "", "hm", (ToolCall("", "add", {"a": 1}),)),
        Message("tool", "3"),
    )
    assert request.options.tools == (TOOL,)
    assert request.options.echo_thinking is True


@pytest.mark.parametrize(
    ("route", "body", "says"),
    [
        ("chat", {"messages": QUESTION, "options": {"mirostat": 2}}, "options.mirostat"),
        ("chat", {"messages": QUESTION, "options": {"temperature": -1}}, "options.temperature"),
        ("chat", {"messages": QUESTION, "format": "xml"}, "format"),
        ("chat", {"messages": [{**QUESTION[0], "images": ["AAAA"]}]}, "text only"),
        ("generate", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("generate", {"prompt": "x", "images": ["AAAA"]}, "images"),
        ("generate", {"prompt": "x", "template": "{{ .Prompt }}"}, "--chat-template"),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(
    endpoint: Make, route: str, body: dict[str, Any], says: str
) -> None:
    response = await post(endpoint(), route, **body)
    assert response.status_code == 400
    assert says in response.json()["error"]


@pytest.mark.parametrize("route", ["chat", "generate"])
async def test_request_without_a_question_loads_or_unloads(endpoint: Make, route: str) -> None:
    api = endpoint()
    assert (await post(api, route)).json()["done_reason"] == "load"
    assert (await post(api, route, keep_alive=0)).json()["done_reason"] == "unload"
    assert not api.client.requests


async def test_model_is_listed_shown_and_running(endpoint: Make) -> None:
    api = endpoint()
    (listed,) = (await api.request("GET", "/api/tags")).json()["models"]
    assert (listed["name"], listed["details"]["format"]) == ("pico", "gguf")
    (running,) = (await api.request("GET", "/api/ps")).json()["models"]
    assert running["context_length"] == api.client.info.n_ctx
    shown = (await post(api, "show")).json()
    assert shown["capabilities"] == ["completion", "tools", "thinking"]
    assert (await post(api, "show", model="llama3")).status_code == 404
    assert (await api.request("GET", "/api/version")).json()["version"]


@pytest.mark.parametrize("verb", ["pull", "push", "create", "copy", "embed", "embeddings"])
async def test_what_is_not_done_here_says_what_does_it(endpoint: Make, verb: str) -> None:
    response = await post(endpoint(), verb)
    assert response.status_code == 400
    assert f"/api/{verb} is not served; use " in response.json()["error"]


async def test_failure_within_a_stream_is_a_line(endpoint: Make) -> None:
    got = await lines(
        endpoint([TextDelta("so far"), EngineDied("it died")]), "chat", messages=QUESTION
    )
    assert got[0]["message"]["content"] == "so far"
    assert got[-1] == {"error": "it died"}


async def test_routes_may_be_switched_off(endpoint: Make) -> None:
    response = await endpoint(ollama=False).request("GET", "/api/tags")
    assert response.status_code == 404
