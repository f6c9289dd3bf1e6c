from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from nanorun.errors import (
    ContextFull,
    EngineDied,
    EngineError,
    MemoryPlanError,
    MemoryShortage,
    UsageError,
)
from nanorun.model.chat import (
    Finished,
    Message,
    Notice,
    PrefillProgress,
    TextDelta,
    ToolArguments,
    ToolCall,
    ToolCallBegun,
    ToolCallDelta,
)
from nanorun.model.think import LOW
from tests.server.conftest import CHAT, Endpoint, Stream, error_of
from tests.support.fakes import reply
from tests.support.waiting import PATIENCE_S

Make = Callable[..., Endpoint]
CALL = ToolCall("call_1", "add", {"a": 1, "b": "ü"})


async def test_completion_has_answer_thinking_and_usage(endpoint: Make) -> None:
    api = endpoint(reply("the answer", thinking="let me see", cached_tokens=5))
    body = (await api.chat()).json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "pico"
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"] == {
        "role": "assistant",
        "content": "the answer",
        "reasoning": "let me see",
    }
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 5, "cached_from": None},
        "completion_tokens_details": {"reasoning_tokens": 3},
    }


@pytest.mark.parametrize(
    ("settings", "fields", "names"),
    [
        ({}, {}, {"reasoning"}),
        ({"thinking_fields": ("reasoning_content",)}, {}, {"reasoning_content"}),
        ({"thinking_fields": ("reasoning", "reasoning_content")}, {},
         {"reasoning", "reasoning_content"}),
        ({}, {"include_reasoning": False}, set()),
        ({}, {"reasoning": {"exclude": True}}, set()),
    ],
)  # fmt: skip
async def test_thinking_has_the_names_that_are_wanted(
    endpoint: Make, settings: dict[str, Any], fields: dict[str, Any], names: set[str]
) -> None:
    api = endpoint(reply("4", thinking="2+2"), reply("4", thinking="2+2"), **settings)
    message = (await api.chat(**fields)).json()["choices"][0]["message"]
    assert message.keys() == {"role", "content"} | names
    stream = await api.stream(**fields)
    assert {name for name in ("reasoning", "reasoning_content") if stream.text(name)} == names


async def test_several_answers_have_seeds_of_their_own_and_all_their_usage(endpoint: Make) -> None:
    api = endpoint(reply("a b"), reply("c", reason="length"))
    body = (await api.chat(n=2, seed=7)).json()
    said = [(c["index"], c["message"]["content"], c["finish_reason"]) for c in body["choices"]]
    assert said == [(0, "a b", "stop"), (1, "c", "length")]
    assert body["usage"]["completion_tokens"] == 3
    assert [request.options.seed for request in api.client.requests] == [7, 8]


async def test_stream_of_several_answers_tells_them_apart(endpoint: Make) -> None:
    stream = await endpoint(reply("a b"), reply("c d")).stream(n=2)
    said = {0: "", 1: ""}
    for chunk in stream.chunks:
        (choice,) = chunk["choices"]
        said[choice["index"]] += choice["delta"].get("content") or ""
    assert said == {0: "a b", 1: "c d"}
    assert [c["choices"][0]["finish_reason"] for c in stream.chunks].count("stop") == 2
    assert stream.is_done


async def test_completion_without_thinking_has_no_reasoning(endpoint: Make) -> None:
    message = (await endpoint(reply("4")).chat()).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "4"}


async def test_completion_with_tool_call_has_null_content(endpoint: Make) -> None:
    choice = (await endpoint(reply(tool_calls=[CALL])).chat()).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    function = {"name": "add", "arguments": '{"a": 1, "b": "ü"}'}
    assert choice["message"]["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": function}
    ]


async def test_completion_cut_short_says_length(endpoint: Make) -> None:
    body = (await endpoint(reply("cut", reason="length")).chat()).json()
    assert body["choices"][0]["finish_reason"] == "length"


async def test_request_reaches_the_engine(endpoint: Make) -> None:
    api = endpoint(think=LOW)
    await api.chat("2+2?", seed=3, temperature=0, stop=["x"], max_tokens=4)
    request = api.client.last
    assert request.messages == (Message("user", "2+2?"),)
    options = request.options
    assert (options.seed, options.temperature, options.stop) == (3, 0, ("x",))
    assert (options.max_tokens, options.think) == (4, LOW)


async def test_stream_has_role_thinking_answer_and_end(endpoint: Make) -> None:
    stream = await endpoint(reply("the answer", thinking="let me see")).stream()
    assert stream.deltas[0] == {"role": "assistant", "content": None}
    assert stream.text("reasoning") == "let me see"
    assert stream.text("content") == "the answer"
    assert [c["choices"][0]["finish_reason"] for c in stream.chunks][-2:] == [None, "stop"]
    assert len({(c["id"], c["created"]) for c in stream.chunks}) == 1
    assert stream.is_done
    assert not any("usage" in chunk for chunk in stream.chunks)


async def test_stream_carries_usage_when_asked(endpoint: Make) -> None:
    stream = await endpoint(reply("a b")).stream(stream_options={"include_usage": True})
    last = stream.chunks[-1]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2
    assert stream.is_done


async def test_stream_tool_calls_are_numbered_and_whole(endpoint: Make) -> None:
    other = ToolCall("call_2", "sub", {})
    stream = await endpoint(reply(tool_calls=[CALL, other])).stream()
    assert calls_of(stream) == {
        0: ("call_1", "add", '{"a": 1, "b": "ü"}'), 1: ("call_2", "sub", "{}")
    }  # fmt: skip


async def test_stream_tool_arguments_come_as_they_are_written(endpoint: Make) -> None:
    steps = [
        ToolCallBegun(0, "call_1", "add"),
        ToolArguments(0, '{"a": 1'),
        ToolArguments(0, ', "b": "ü"}'),
        ToolCallDelta(0, CALL),
        Finished("tool_calls"),
    ]
    stream = await endpoint(steps).stream()
    assert calls_of(stream) == {0: ("call_1", "add", '{"a": 1, "b": "ü"}')}
    assert len([delta for delta in stream.deltas if "tool_calls" in delta]) == 3


async def test_stream_tool_call_that_broke_off_never_ends(endpoint: Make) -> None:
    broken = ToolCallDelta(0, ToolCall("call_1", "add", {"a": 1}), "it broke off")
    steps = [
        ToolCallBegun(0, "call_1", "add"),
        ToolArguments(0, '{"a": 1, "b": "half'),
        broken,
        Finished("stop"),
    ]
    assert calls_of(await endpoint(steps).stream()) == {0: ("call_1", "add", '{"a": 1, "b": "half')}


def calls_of(stream: Stream) -> dict[int, tuple[str, str, str]]:
    """The calls as a client puts them together: id, name and arguments by index."""
    calls: dict[int, tuple[str, str, str]] = {}
    for piece in (call for delta in stream.deltas for call in delta.get("tool_calls", ())):
        if "id" in piece:
            calls[piece["index"]] = (piece["id"], piece["function"]["name"], "")
        id_, name, arguments = calls[piece["index"]]
        calls[piece["index"]] = (id_, name, arguments + piece["function"]["arguments"])
    return calls


@pytest.mark.parametrize("stream", [False, True])
async def test_notices_are_logged_for_who_runs_the_server(
    endpoint: Make, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    api = endpoint([Notice("opened smaller"), *reply("x")])
    await (api.stream() if stream else api.chat())
    assert [record.message for record in caplog.records] == ["opened smaller"]


async def test_stream_tells_of_prefill_and_notices_in_comments(endpoint: Make) -> None:
    steps = [PrefillProgress(3, 9, 0), Notice("restarted\nthe engine"), *reply("x")]
    stream = await endpoint(steps).stream()
    assert stream.comments[:2] == ["prompt 3 of 9 tokens", "notice: restarted the engine"]
    assert stream.text("content") == "x"


async def test_stream_is_kept_alive_while_nothing_comes(endpoint: Make) -> None:
    stream = await endpoint([0.3, *reply("x")], keepalive_s=0.05).stream()
    assert "waiting" in stream.comments
    assert stream.text("content") == "x"


FAILURES = [
    (ContextFull("9000 tokens do not fit 8192"), 400, "context_length_exceeded"),
    (UsageError("roles must alternate"), 400, None),
    (EngineDied("the engine's process was ended by SIGKILL"), 503, "engine_died"),
    (MemoryPlanError("a context of 8192 tokens could not be allocated"), 503, "out_of_memory"),
    (MemoryShortage("the model needs 17.0 GiB", retry_after_s=4.2), 503, "out_of_memory"),
    (EngineError("llama_decode failed"), 500, "engine_error"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "code"), FAILURES)
async def test_failure_before_the_first_event_has_a_status(
    endpoint: Make, error: Exception, status: int, code: str | None, stream: bool
) -> None:
    response = await endpoint([error]).chat(stream=stream)
    assert response.status_code == status
    body = error_of(response)
    assert body["code"] == code
    assert body["message"].startswith(str(error))


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (MemoryShortage("the model needs 17.0 GiB", retry_after_s=4.2), "5"),
        (MemoryPlanError("a context of 8192 tokens could not be allocated"), "30"),
        (EngineDied("the engine's process was ended by SIGKILL"), "1"),
        (EngineError("llama_decode failed"), None),
    ],
)
async def test_failure_that_may_pass_says_when_to_try_again(
    endpoint: Make, error: Exception, seconds: str | None
) -> None:
    response = await endpoint([error]).chat()
    assert response.headers.get("retry-after") == seconds


async def test_failure_within_a_stream_is_an_event_and_no_done(endpoint: Make) -> None:
    steps = [TextDelta("so far"), EngineDied("the engine's process was ended by SIGKILL")]
    stream = await endpoint(steps).stream()
    assert stream.text("content") == "so far"
    assert stream.chunks[-1]["error"]["code"] == "engine_died"
    assert not stream.is_done


async def test_failure_unforeseen_is_not_described(
    endpoint: Make, caplog: pytest.LogCaptureFixture
) -> None:
    response = await endpoint([ZeroDivisionError("secret path")]).chat()
    assert response.status_code == 500
    assert "secret" not in response.text
    assert error_of(response)["type"] == "server_error"
    assert "secret path" in caplog.text


async def test_failure_leaves_room_for_the_next_request(endpoint: Make) -> None:
    api = endpoint([EngineDied("gone")], reply("back"), max_queued=0, n_parallel=1)
    assert (await api.chat()).status_code == 503
    assert (await api.chat()).json()["choices"][0]["message"]["content"] == "back"


async def test_model_of_another_name_is_not_found(endpoint: Make) -> None:
    response = await endpoint().chat(model="gpt-5")
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"
    assert "'pico'" in error_of(response)["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_queue_that_is_full_says_when_to_come_back(endpoint: Make, stream: bool) -> None:
    gate = asyncio.Event()
    api = endpoint([gate, *reply("late")], n_parallel=1, max_queued=1)
    waiting = [asyncio.ensure_future(api.chat(stream=stream)) for _ in range(2)]
    while len(api.client.requests) < 2:
        await asyncio.sleep(0)
    refused = await api.chat(stream=stream)
    assert refused.status_code == 429
    assert error_of(refused)["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) >= 1
    gate.set()
    assert [r.status_code for r in await asyncio.gather(*waiting)] == [200, 200]
    assert (await api.chat(stream=stream)).status_code == 200


def raw_scope(path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost:8080"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 5000),
        "server": ("127.0.0.1", 8080),
    }


class LeavingClient:
    """A connection that sends a request and hangs up when told."""

    def __init__(self, body: bytes) -> None:
        self.left = asyncio.Event()
        self.sent: list[Any] = []
        self._messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive(self) -> Any:
        if self._messages:
            return self._messages.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.mark.parametrize("stream", [b"false", b"true"])
@pytest.mark.parametrize("n_before", [0, 3])
async def test_client_that_leaves_cancels_its_reply(
    endpoint: Make, stream: bytes, n_before: int
) -> None:
    api = endpoint([*reply("some words to send")[:n_before], asyncio.Event()])
    body = b'{"messages": [{"role": "user", "content": "x"}], "stream": %s}' % stream
    connection = LeavingClient(body)
    app: Any = api.app
    task = asyncio.ensure_future(app(raw_scope(CHAT), connection.receive, connection.send))
    while not api.client.requests or len(api.client.last.generation.sent) < n_before:
        await asyncio.sleep(0)
    connection.left.set()
    await asyncio.wait_for(task, PATIENCE_S)
    assert api.client.last.generation.was_abandoned
    health = (await api.request("GET", "/health")).json()
    assert health["n_active"] == 0


UNREADABLE = ToolCallDelta(0, ToolCall("call_0", "", {}), "not a tool call: x")


async def test_calls_are_numbered_as_they_are_sent(endpoint: Make) -> None:
    call = ToolCallDelta(0, ToolCall("call_1", "f", {}))
    stream = await endpoint([UNREADABLE, call, Finished("tool_calls")]).stream()
    assert calls_of(stream) == {0: ("call_1", "f", "{}")}
    assert stream.chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_reply_without_a_usable_call_does_not_say_that_it_calls(endpoint: Make) -> None:
    script = [UNREADABLE, Finished("tool_calls")]
    choice = (await endpoint(script).chat()).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    stream = await endpoint(script).stream()
    assert stream.chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_call_that_cannot_be_read_comes_as_text(endpoint: Make) -> None:
    problem = "a tool call that cannot be read: x"
    unreadable = ToolCallDelta(0, ToolCall("call_0", "", {}), problem)
    api = endpoint([unreadable, Finished("stop")])
    message = (await api.chat()).json()["choices"][0]["message"]
    assert message["content"] == problem
    assert "tool_calls" not in message
