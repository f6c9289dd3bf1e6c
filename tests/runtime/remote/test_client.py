"""The remote engine against an endpoint that speaks every dialect and makes every mistake."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from nanorun.errors import (
    ContextFull,
    EngineDied,
    EngineError,
    LibraryError,
    NanorunError,
    UsageError,
)
from nanorun.model.chat import (
    Event,
    Finished,
    GenerateOptions,
    Message,
    Notice,
    PrefillProgress,
    RawPrompt,
    TextDelta,
    ThinkingDelta,
    TokenLogprobs,
    ToolArguments,
    ToolCall,
    ToolCallBegun,
    ToolCallDelta,
    Usage,
)
from nanorun.model.think import LOW, OFF, Think
from nanorun.runtime.remote import RemoteClient
from nanorun.runtime.remote.errors import EndpointRefused, NothingThere
from nanorun.runtime.remote.http import RemoteSettings
from tests.runtime.remote.scripted_endpoint import (
    LLAMA_MODEL,
    NANORUN_MODEL,
    OTHER_MODEL,
    VLLM_MODEL,
    Answer,
    ScriptedEndpoint,
    delta,
    scripted,
    sse,
    usage,
)
from tests.support.calls import assert_told
from tests.support.waiting import PATIENCE_S, become

QUESTION = (Message("user", "2+2?"),)
FAST = RemoteSettings(read_timeout_s=PATIENCE_S, backoff_s=0.01)
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
            "required": ["a"],
        },
    },
}


@asynccontextmanager
async def talking(
    *answers: Answer, settings: RemoteSettings = FAST, **options: Any
) -> AsyncIterator[tuple[RemoteClient, ScriptedEndpoint]]:
    async with scripted(*answers, **options) as endpoint:
        engine = RemoteClient(endpoint.url, settings=settings)
        try:
            yield engine, endpoint
        finally:
            await engine.close()


async def ask(engine: RemoteClient, **options: Any) -> list[Event]:
    return [event async for event in engine.generate(QUESTION, GenerateOptions(**options))]


async def answer_to(*payloads: Any, **options: Any) -> list[Event]:
    """The events of a stream of these payloads."""
    model = options.pop("model", OTHER_MODEL)
    async with talking(Answer.stream(*payloads), models=[model]) as (engine, _):
        return await ask(engine, **options)


async def error_from(answer: Answer, *, model: Any = OTHER_MODEL, **options: Any) -> NanorunError:
    with pytest.raises(NanorunError) as caught:
        async with talking(answer, models=[model]) as (engine, _):
            await ask(engine, **options)
    return caught.value


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def thinking_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, ThinkingDelta))


def notices_of(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice)]


def end_of(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


WHOLE = (delta(content="4"), delta("stop"), usage(7, 3))


# --- reaching it ----------------------------------------------------------------------------


async def test_info_is_what_the_endpoint_tells() -> None:
    async with talking(Answer(), models=[LLAMA_MODEL]) as (engine, endpoint):
        info = await engine.start()
        assert (info.name, info.n_ctx, info.n_params, info.n_layer) == ("nano", 4096, 7, 0)
        assert info.path == f"{endpoint.url}/v1"
        assert info.device == endpoint.url.removeprefix("http://")
        await engine.start()
        assert endpoint.n_models == 1


async def test_several_models_have_to_be_named() -> None:
    models = [{"id": "small"}, {"id": "large"}]
    async with talking(Answer.stream(*WHOLE), models=models) as (engine, endpoint):
        with pytest.raises(UsageError, match="lists 2 models; name one") as caught:
            await engine.start()
        assert caught.value.facts == ("models: small, large",)
        named = RemoteClient(endpoint.url, "large", FAST)
        await ask(named)
        assert endpoint.requests[0].body["model"] == "large"
        with pytest.raises(UsageError, match="has no model 'huge'"):
            await RemoteClient(endpoint.url, "huge", FAST).start()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (Answer([b"<html>hello</html>"], kind="text/html"), "does not answer as an OpenAI-style"),
        (Answer([b""], kind="application/json"), "does not answer as an OpenAI-style"),
        (Answer.json({"models": []}), "does not list models"),
        (Answer.json([1]), "does not list models"),
        (Answer.json({"data": []}), "lists 0 models"),
    ],
)
async def test_something_else_at_that_address_is_said_so(body: Answer, says: str) -> None:
    async with talking(Answer()) as (engine, endpoint):
        endpoint.models_answer(body)
        with pytest.raises(NanorunError, match=says):
            await engine.start()


async def test_nothing_at_that_address_is_said_so() -> None:
    async with scripted(Answer()) as endpoint:
        url = endpoint.url
    with pytest.raises(EngineDied, match=r"cannot be reached: connection refused") as caught:
        await ask(RemoteClient(url))
    assert url in caught.value.message


async def test_endpoint_that_went_away_is_found_again() -> None:
    async with talking(Answer.stream(*WHOLE)) as (engine, endpoint):
        endpoint.models_answer(Answer.json({}, status=500))
        with pytest.raises(EngineError, match=r"failed \(500\)"):
            await engine.start()
        endpoint.models_answer(Answer.json({"data": [OTHER_MODEL]}))
        assert text_of(await ask(engine)) == "4"


async def test_proxy_that_cannot_be_used_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "gopher://127.0.0.1:1")
    with pytest.raises(LibraryError, match="the proxy of the environment cannot be used"):
        await RemoteClient("http://spark.local:8000").start()
    async with talking(Answer.stream(*WHOLE)) as (engine, _):
        assert text_of(await ask(engine)) == "4"  # loopback needs none


# --- the key --------------------------------------------------------------------------------


async def test_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANORUN_API_KEY", " sk-own ")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    async with talking(Answer.stream(*WHOLE)) as (engine, endpoint):
        await ask(engine)
        assert endpoint.requests[0].headers["authorization"] == "Bearer sk-own"


async def test_key_of_another_service_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    async with talking(Answer.stream(*WHOLE)) as (engine, endpoint):
        await ask(engine)
        assert "authorization" not in endpoint.requests[0].headers


async def test_key_is_in_no_error_and_no_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("NANORUN_API_KEY", "sk-secret")
    body = {"error": {"message": "Incorrect API key provided: sk-secret", "code": "bad_key"}}
    error = await error_from(Answer.json(body, status=401))
    assert "refused the API key" in error.message
    assert "Incorrect API key provided: ***" in error.facts
    assert "sk-secret" not in error.render() + repr(error) + caplog.text


def test_key_that_no_header_can_carry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANORUN_API_KEY", "sk\nInjected: yes")
    with pytest.raises(UsageError, match="NANORUN_API_KEY holds characters") as caught:
        RemoteClient("http://127.0.0.1:1")
    assert "Injected" not in caught.value.render()


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        (Answer.json({"error": {"message": "no"}}, 403), EngineError, "refused the API key"),
        (Answer.json({"detail": "Not Found"}, 404), NothingThere, "there is nothing at"),
        (
            Answer.json({"error": {"message": "The model `x` does not exist."}}, 404),
            UsageError,
            "does not have that model",
        ),
        (
            Answer.json({"error": {"message": "temperature is 9"}}, 400),
            EndpointRefused,
            r"refused the request \(400\)",
        ),
        (Answer.json({"detail": [{"loc": 1}]}, 422), EndpointRefused, "refused the request"),
        (
            Answer.json({"error": {"message": "long", "code": "context_length_exceeded"}}, 400),
            ContextFull,
            "does not fit the context",
        ),
        (
            Answer.json({"error": {"message": "m", "type": "exceed_context_size_error"}}, 400),
            ContextFull,
            "does not fit the context",
        ),
        (
            Answer.json({"error": {"message": "m", "param": "input_tokens", "code": 400}}, 400),
            ContextFull,
            "does not fit the context",
        ),
        (
            Answer.json({"error": {"message": "No x.", "code": "model_not_found"}}, 404),
            UsageError,
            "does not have that model",
        ),
        (
            Answer.json({"error": {"message": "No x.", "param": "model", "code": 404}}, 404),
            UsageError,
            "does not have that model",
        ),
        (
            Answer.json({"message": "maximum context length is 8 tokens", "code": 400}, 400),
            ContextFull,
            "does not fit the context",
        ),
        (Answer([b"<html>oops</html>"], 500, "text/html"), EngineError, r"failed \(500\)"),
        (Answer([], 308, headers={"Location": "https://x/"}), EngineError, "redirects to https"),
        (Answer([b"<html>"], kind="text/html"), EngineError, "does not answer as an OpenAI-style"),
        (Answer.json({"hello": 1}), EngineError, "does not answer as an OpenAI-style"),
        (Answer([sse("{oops")]), EngineError, "sent a chunk that is not JSON"),
        (Answer([sse("[1]")]), EngineError, "sent a chunk that is no object"),
        (Answer([b"data: " + b"x" * (17 * 2**20)]), EngineError, "is longer than 16777216 bytes"),
    ],
)
async def test_refusal_is_told_in_its_own_words(
    answer: Answer, kind: type[NanorunError], says: str
) -> None:
    error = await error_from(answer)
    assert type(error) is kind
    with pytest.raises(NanorunError, match=says):
        raise error


async def test_error_keeps_what_the_endpoint_said() -> None:
    error = await error_from(Answer.json({"error": {"message": "temperature\nis 9"}}, 400))
    assert error.facts == ("temperature is 9",)


@pytest.mark.parametrize(
    ("payload", "kind", "says"),
    [
        ({"error": {"message": "killed", "code": "engine_died"}}, EngineDied, "died"),
        (
            {"error": {"message": "x", "code": "engine_died", "type": "server_error"}},
            EngineDied,
            "the engine behind",
        ),
        ({"error": {"message": "oops", "type": "server_error"}}, EngineError, "in mid-answer"),
        ({"error": {"message": "bad", "code": 400}}, EndpointRefused, "refused the request"),
        ({"error": "plain words"}, EngineError, "in mid-answer"),
    ],
)
async def test_error_inside_the_stream_ends_it(
    payload: Any, kind: type[NanorunError], says: str
) -> None:
    error = await error_from(Answer([sse(delta(content="4"), payload)]))
    assert type(error) is kind
    assert says in error.message


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [b": hello\n\n"],
        [sse(delta(content="4"))],
        [sse(delta(content="4")), "reset"],
        [sse(delta(content="4")), b'data: {"choices": [{"del', "reset"],
        ["reset"],
    ],
)
async def test_stream_that_breaks_off_is_no_answer(pieces: Any) -> None:
    error = await error_from(Answer(pieces))
    assert isinstance(error, EngineDied)
    assert "connection" in error.message


@pytest.mark.parametrize("end", [[], ["reset"], [sse("[DONE]")]])
async def test_stream_may_end_in_any_way_once_it_gave_its_reason(end: Any) -> None:
    async with talking(Answer([sse(*WHOLE), 0.05, *end])) as (engine, _):
        events = await ask(engine)
    assert (text_of(events), end_of(events).reason) == ("4", "stop")


async def test_stream_without_a_reason_ends_with_stop() -> None:
    assert end_of(await answer_to(delta(content="4"))).reason == "stop"


async def test_silence_has_an_end() -> None:
    settings = RemoteSettings(read_timeout_s=0.1)
    with pytest.raises(EngineDied, match=r"has sent nothing for 0.1 s"):
        async with talking(Answer([sse(delta(content="4")), 3.0]), settings=settings) as (e, _):
            await ask(e)


# --- patience -------------------------------------------------------------------------------

BUSY = Answer.json({"error": {"message": "slow down"}}, 429, **{"Retry-After": "0.02"})


async def test_busy_endpoint_is_asked_again() -> None:
    loading = Answer.json({"error": {"message": "Loading model"}}, 503)
    async with talking(BUSY, loading, Answer.stream(*WHOLE)) as (engine, endpoint):
        events = await ask(engine)
    assert text_of(events) == "4"
    assert len(endpoint.requests) == 3
    first, second = notices_of(events)
    assert "(429): slow down; asking again in 0.0 s" in first
    assert "(503): Loading model" in second


async def test_busy_endpoint_is_given_up_after_a_few_times() -> None:
    with pytest.raises(EngineError, match=r"takes no request now \(429\): slow down"):
        async with talking(BUSY) as (engine, endpoint):
            await ask(engine)
    assert len(endpoint.requests) == FAST.n_attempts


@pytest.mark.parametrize("value", ["3600", "Fri, 31 Dec 2094 23:59:59 GMT"])
async def test_endpoint_that_wants_an_hour_is_given_up_at_once(value: str) -> None:
    with pytest.raises(EngineError, match="takes no request now"):
        async with talking(Answer([], 429, headers={"Retry-After": value})) as (engine, endpoint):
            await ask(engine)
    assert len(endpoint.requests) == 1


async def test_failure_in_mid_answer_is_not_repeated() -> None:
    with pytest.raises(EngineDied):
        async with talking(Answer([sse(delta(content="4"))])) as (engine, endpoint):
            await ask(engine)
    assert len(endpoint.requests) == 1


# --- what it says ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [("reasoning",), ("reasoning_content",), ("reasoning", "reasoning_content")]
)
async def test_thinking_comes_in_either_field(names: tuple[str, ...]) -> None:
    def both(text: str) -> dict[str, Any]:
        return delta(content=None, **dict.fromkeys(names, text))

    events = await answer_to(both("\nhm"), both("m\n"), both("so\n\n"), *WHOLE)
    assert thinking_of(events) == "hmm\nso"
    assert text_of(events) == "4"


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "4"}, {"type": "output_text", "text": "2"}],
        ["4", None, {"type": "image"}, {"text": "2"}],
        {"type": "text", "text": "42"},
    ],
)
async def test_content_may_be_a_list_of_parts(content: Any) -> None:
    events = await answer_to(delta(content=content), *WHOLE[1:])
    assert text_of(events) == "42"
    assert end_of(events).usage.completion_tokens == 3


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
        {"type": "thinking", "thinking": "hm"},
        {"type": "reasoning", "text": "hm"},
    ],
)
async def test_part_of_a_content_may_be_thinking(part: Any) -> None:
    text = {"type": "text", "text": "4"}
    events = await answer_to(delta(content=[part, text]), delta("stop"), usage(7, 2))
    assert (thinking_of(events), text_of(events)) == ("hm", "4")
    assert end_of(events).usage.thinking_tokens == 1


async def test_older_completions_are_read() -> None:
    chunks = [{"choices": [{"index": 0, "text": text}]} for text in ("4", "2", "")]
    chunks.append({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
    events = await answer_to(*chunks, usage(7, 2))
    assert (text_of(events), end_of(events).reason) == ("42", "length")
    whole = Answer.json({"choices": [{"text": "42", "finish_reason": "stop"}]})
    async with talking(whole) as (engine, _):
        assert text_of(await ask(engine)) == "42"


async def test_thinking_goes_back_in_the_field_it_came_in() -> None:
    thought = Answer.stream(delta(reasoning="hm"), *WHOLE)
    async with talking(thought) as (engine, endpoint):
        turn = Message("assistant", "4", thinking="hm")
        for _ in range(2):
            generation = engine.generate((*QUESTION, turn, *QUESTION), GenerateOptions())
            assert [event async for event in generation]
        first, second = (request.body["messages"][1] for request in endpoint.requests)
    assert first == {"role": "assistant", "content": "4"}
    assert second == {"role": "assistant", "content": "4", "reasoning": "hm"}


async def test_tags_left_in_the_text_are_understood() -> None:
    pieces = (
        "<thi",
        "nk>hm</",
        "think>\n\nso <tool",
        '_call>{"name":"add","arg',
        'uments":{"a":1}}',
    )
    chunks = [delta(content=piece) for piece in (*pieces, "</tool_call>")]
    events = await answer_to(*chunks, delta("stop"), tools=(TOOL,))
    assert (thinking_of(events), text_of(events)) == ("hm", "so")
    (call,) = [event for event in events if isinstance(event, ToolCallDelta)]
    assert (call.call.name, call.call.arguments) == ("add", {"a": 1})
    assert end_of(events).reason == "tool_calls"


def call_piece(arguments: Any = None, **fields: Any) -> dict[str, Any]:
    name = fields.pop("name", None)
    function = {"name": name, "arguments": arguments}
    return delta(tool_calls=[{**fields, "function": function}])


async def calls_of(*chunks: Any) -> list[ToolCallDelta]:
    events = await answer_to(*chunks, delta("tool_calls"), tools=(TOOL,))
    assert end_of(events).reason == "tool_calls"
    assert_told(events)
    return [event for event in events if isinstance(event, ToolCallDelta)]


async def test_tool_calls_are_put_together_from_pieces() -> None:
    calls = await calls_of(
        call_piece("", index=0, id="c0", name="add"),
        call_piece('{"a"', index=0),
        call_piece(": 1}", index=0),
        call_piece('{"a": 2, "b": "ü"}', index=1, id="c1", name="add"),
    )
    assert [(call.index, call.call, call.problem) for call in calls] == [
        (0, ToolCall("c0", "add", {"a": 1}), None),
        (1, ToolCall("c1", "add", {"a": 2, "b": "ü"}), None),
    ]


async def test_arguments_are_told_as_they_come_and_as_they_are_read() -> None:
    events = await answer_to(
        call_piece('{"b":"\\u00', index=0, id="c0", name="ADD"),
        call_piece("fc x", index=0),
        call_piece('y","a":"1', index=0),
        call_piece('2"}', index=0),
        delta("tool_calls"),
        tools=(TOOL,),
    )
    call = ToolCall("c0", "add", {"b": "ü xy", "a": 12})
    assert [e for e in events if isinstance(e, ToolCallBegun | ToolArguments | ToolCallDelta)] == [
        ToolCallBegun(0, "c0", "add"),
        ToolArguments(0, '{"b": "'),
        ToolArguments(0, "ü x"),
        ToolArguments(0, 'y"'),
        ToolArguments(0, ', "a": 12'),
        ToolArguments(0, "}"),
        ToolCallDelta(0, call),
    ]


async def test_calls_in_the_text_and_beside_it_are_counted_together() -> None:
    written = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    calls = await calls_of(
        delta(content=written), call_piece('{"a": 2}', index=0, id="c", name="add")
    )
    assert [(call.index, call.call.arguments) for call in calls] == [(0, {"a": 1}), (1, {"a": 2})]


async def test_tool_calls_without_numbers_and_ids_are_told_apart_by_name() -> None:
    calls = await calls_of(
        call_piece('{"a": 1', name="add"), call_piece("}"), call_piece({"a": 2}, name="add")
    )
    assert [call.call.arguments for call in calls] == [{"a": 1}, {"a": 2}]
    assert len({call.call.id for call in calls}) == 2


@pytest.mark.parametrize(
    ("arguments", "name", "says"),
    [
        ('{"a": 1', "add", '{"a": 1'),
        ('{"a": "one"}', "add", "a"),
        ("{}", "add", "a"),
        ('{"a": 1}', "subtract", "no tool is called 'subtract'"),
        ("[1]", "add", "[1]"),
    ],
)
async def test_tool_call_that_does_not_fit_is_reported(
    arguments: str, name: str, says: str
) -> None:
    (call,) = await calls_of(call_piece(arguments, index=0, id="c", name=name))
    assert call.call.name == name
    assert call.problem is not None
    assert says in call.problem


async def test_usage_and_where_it_was_cached_are_taken_over() -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 5, "cached_from": "disk"}}
    details["completion_tokens_details"] = {"reasoning_tokens": 2}  # type: ignore[dict-item]
    events = await answer_to(delta(content="4"), delta("stop"), usage(7, 3, **details))
    assert end_of(events).usage == Usage(7, 5, "disk", 2, 3)


async def test_thinking_tokens_that_are_not_told_apart_are_shared_out_by_pieces() -> None:
    thoughts = [delta(reasoning="x")] * 3
    events = await answer_to(*thoughts, delta(content="4"), delta("stop"), usage(7, 8))
    assert end_of(events).usage == Usage(7, 0, None, 6, 8)


async def test_missing_usage_is_counted_and_said_once() -> None:
    chunks = (delta(reasoning="hm"), delta(content="4"), delta(content="2"), delta("stop"))
    async with talking(Answer.stream(*chunks)) as (engine, _):
        first, second = await ask(engine), await ask(engine)
    assert end_of(first).usage == Usage(thinking_tokens=1, completion_tokens=3)
    assert ["counts no tokens" in text for text in notices_of(first)] == [True]
    assert notices_of(second) == []


async def test_likelihoods_come_before_their_text() -> None:
    top = [{"token": "4", "logprob": -0.1, "bytes": [52]}, {"token": "5", "logprob": -3}]
    chunk = delta(content="4")
    chunk["choices"][0]["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    events = await answer_to(chunk, delta("stop"), usage(7, 1), logprobs=2)
    assert events[:2] == [TokenLogprobs(b"4", -0.1, ((b"4", -0.1), (b"5", -3.0))), TextDelta("4")]


async def test_reason_that_nobody_knows_is_said() -> None:
    events = await answer_to(delta(content="4"), delta("content_filter"), usage(1, 1))
    assert end_of(events).reason == "stop"
    assert notices_of(events) == ["the endpoint ended the reply with reason 'content_filter'"]


async def test_answer_in_one_piece_is_an_answer_too() -> None:
    message = {"role": "assistant", "content": "4", "reasoning_content": "hm"}
    body = {"id": "x", "choices": [{"message": message, "finish_reason": "length"}]}
    body["usage"] = {"prompt_tokens": 7, "completion_tokens": 3}  # type: ignore[assignment]
    async with talking(Answer.json(body)) as (engine, _):
        events = await ask(engine)
    assert (thinking_of(events), text_of(events)) == ("hm", "4")
    assert (end_of(events).reason, end_of(events).usage.completion_tokens) == ("length", 3)


async def test_other_choices_and_odd_values_are_read_over() -> None:
    other = {"choices": [{"index": 1, "delta": {"content": "no"}}, None, {"delta": None}]}
    odd = {"choices": None, "usage": 3, "timings": [], "id": 5}
    events = await answer_to(other, odd, delta(content=3), *WHOLE)
    assert text_of(events) == "4"


async def test_progress_is_told_as_llama_cpp_and_nanorun_tell_it() -> None:
    progress = {"processed": 5, "total": 9, "cache": 2}
    events = await answer_to({"prompt_progress": progress}, *WHOLE, model=LLAMA_MODEL)
    assert events[0] == PrefillProgress(5, 9, 2)
    told = b": prompt 3 of 9 tokens\n\n: waiting\n\n: notice: restarted\n\n"
    async with talking(Answer([told + sse(*WHOLE)]), models=[NANORUN_MODEL]) as (engine, _):
        events = await ask(engine)
    assert events[:2] == [PrefillProgress(3, 9, 0), Notice("restarted")]


async def test_times_of_llama_cpp_are_taken_over() -> None:
    times = {
        "prompt_ms": 500,
        "predicted_ms": 2000.0,
        "prompt_per_second": 9,
        "predicted_per_second": 4,
    }
    timings = end_of(await answer_to(*WHOLE, {"choices": [], "timings": times})).timings
    assert (timings.prefill_s, timings.decode_s, timings.decode_tps) == (0.5, 2.0, 4.0)


async def test_times_that_are_not_told_are_measured() -> None:
    pieces = [0.05, sse(delta(content="a")), 0.1, sse(delta(content="b"), delta("stop"))]
    async with talking(Answer([*pieces, sse(usage(7, 2), "[DONE]")])) as (engine, _):
        began = time.monotonic()
        timings = end_of(await ask(engine)).timings
        took_s = time.monotonic() - began
    assert timings.prefill_s > 0 and timings.decode_s > 0
    assert timings.prefill_s + timings.decode_s <= took_s
    assert timings.decode_tps == pytest.approx(1 / timings.decode_s)


async def test_stop_string_is_found_here_where_the_endpoint_would_look_in_the_thinking() -> None:
    answer = Answer([sse(delta(reasoning="END?"), delta(content="4 E"), delta(content="NDx")), 3.0])
    async with talking(answer, models=[VLLM_MODEL]) as (engine, endpoint):
        events = await ask(engine, stop=("END",))
        assert "stop" not in endpoint.requests[0].body
        await become(lambda: endpoint.n_dropped == 1)
    assert (thinking_of(events), text_of(events)) == ("END?", "4")
    assert (end_of(events).reason, end_of(events).stop_text) == ("stop", "END")


async def test_stop_string_the_endpoint_found_is_named() -> None:
    last = delta("stop")
    last["choices"][0]["stop_reason"] = "END"
    events = await answer_to(delta(content="4"), last, think=OFF, stop=("END",))
    assert end_of(events).stop_text == "END"


# --- cancelling -----------------------------------------------------------------------------

ENDLESS = Answer([piece for _ in range(400) for piece in (sse(delta(content="x ")), 0.01)])


async def test_cancel_closes_the_connection() -> None:
    async with talking(ENDLESS) as (engine, endpoint):
        generation = engine.generate(QUESTION, GenerateOptions())
        await anext(generation)
        await generation.cancel()
        (end,) = [event async for event in generation if isinstance(event, Finished)]
        assert end.reason == "cancelled"
        assert end.usage.completion_tokens >= 1
        await become(lambda: endpoint.n_dropped == 1)


async def test_cancel_while_it_waits_ends_it_at_once() -> None:
    async with talking(Answer([10.0**6])) as (engine, endpoint):
        generation = engine.generate(QUESTION, GenerateOptions())
        first = asyncio.ensure_future(anext(generation))
        await become(lambda: endpoint.requests)
        await generation.cancel()
        assert await asyncio.wait_for(first, PATIENCE_S) == Finished(
            "cancelled", timings=first.result().timings
        )  # type: ignore[union-attr]


async def test_cancel_before_it_begins_asks_nobody() -> None:
    async with talking(ENDLESS) as (engine, endpoint):
        generation = engine.generate(QUESTION, GenerateOptions())
        await generation.cancel()
        assert [event async for event in generation] == [Finished("cancelled")]
        assert endpoint.requests == []


async def test_cancel_while_the_endpoint_is_busy_ends_the_waiting() -> None:
    busy = Answer([], 429, headers={"Retry-After": "30"})
    async with talking(busy) as (engine, _):
        generation = engine.generate(QUESTION, GenerateOptions())
        assert isinstance(await anext(generation), Notice)
        rest = asyncio.ensure_future(anext(generation))
        await asyncio.sleep(0.05)
        await generation.cancel()
        assert (await asyncio.wait_for(rest, PATIENCE_S)) == Finished("cancelled")


# --- how long it thinks ---------------------------------------------------------------------


def thinking_stream(n: int, text: str = " hm.") -> Answer:
    pieces = [piece for _ in range(n) for piece in (sse(delta(reasoning=text)), 0.01)]
    return Answer([*pieces, sse(*WHOLE, "[DONE]")])


async def test_two_calls_end_the_thinking_of_vllm() -> None:
    rest = Answer.stream(delta(reasoning="\n\n4"), delta(content="2"), delta("stop"), usage(30, 5))
    async with talking(thinking_stream(300), rest, models=[VLLM_MODEL]) as (engine, endpoint):
        generation = engine.generate(QUESTION, GenerateOptions(max_tokens=900))
        events = [await anext(generation) for _ in range(4)]
        await generation.finish_thinking()
        events += [event async for event in generation]
    assert text_of(events).strip() == "42"  # what its parser takes for thinking is the answer
    first, second = (request.body for request in endpoint.requests)
    begun = {"role": "assistant", "content": f"<think>\n{thinking_of(events)}\n</think>\n\n"}
    assert second["messages"] == [*first["messages"], begun]
    assert (second["add_generation_prompt"], second["continue_final_message"]) == (False, True)
    n_thinking = end_of(events).usage.thinking_tokens
    assert 4 <= n_thinking < 300
    assert second["max_tokens"] == 900 - n_thinking
    assert end_of(events).usage == Usage(30 - n_thinking, 0, None, n_thinking, n_thinking + 5)
    assert endpoint.n_dropped == 1


async def test_budget_of_vllm_is_held_here_and_lands_at_the_end_of_a_sentence() -> None:
    words = [sse(delta(reasoning=word)) for word in ("one", " two", " three.", " four", " five")]
    rest = Answer.stream(*WHOLE)
    async with talking(Answer([*words, 3.0]), rest, models=[VLLM_MODEL]) as (engine, endpoint):
        events = await ask(engine, think=Think(2))
    assert thinking_of(events) == "one two three."
    assert "thinking_token_budget" not in endpoint.requests[0].body
    assert end_of(events).usage.thinking_tokens == 3


@pytest.mark.parametrize("model", [LLAMA_MODEL, NANORUN_MODEL])
async def test_control_route_ends_the_thinking(model: Any) -> None:
    async with talking(thinking_stream(40), models=[model]) as (engine, endpoint):
        generation = engine.generate(QUESTION, GenerateOptions())
        events = [await anext(generation) for _ in range(2)]
        await generation.finish_thinking()
        events += [event async for event in generation]
    (control,) = endpoint.controls
    assert control.body == {"id": "chatcmpl-1", "action": "reasoning_end"}
    assert control.path == "/v1/chat/completions/control"
    assert notices_of(events) == []


async def test_nanorun_takes_a_new_budget() -> None:
    async with talking(thinking_stream(10), models=[NANORUN_MODEL]) as (engine, endpoint):
        generation = engine.generate(QUESTION, GenerateOptions())
        await anext(generation)
        await generation.set_budget(64)
        await generation.set_budget(None)
        assert [event async for event in generation]
    budgets = [request.body["reasoning_budget"] for request in endpoint.controls]
    assert budgets == [64, -1]


async def test_llama_cpp_ends_at_a_budget_set_later_and_cannot_go_beyond_its_first() -> None:
    async with talking(thinking_stream(40), models=[LLAMA_MODEL]) as (engine, endpoint):
        generation = engine.generate(QUESTION, GenerateOptions(think=Think(100)))
        events = [await anext(generation)]
        await generation.set_budget(4000)
        await generation.set_budget(5)
        events += [event async for event in generation]
    assert endpoint.requests[0].body["reasoning_budget_tokens"] == 132
    assert len(endpoint.controls) == 1
    assert notices_of(events) == ["the endpoint holds this reply to 132 tokens of thinking"]


async def test_control_route_that_is_missing_is_said() -> None:
    missing = Answer.json({"error": {"message": "File Not Found", "code": 404}}, 404)
    models = [LLAMA_MODEL]
    async with talking(thinking_stream(10), models=models, control=missing) as (engine, _):
        generation = engine.generate(QUESTION, GenerateOptions())
        events = [await anext(generation)]
        await generation.finish_thinking()
        events += [event async for event in generation]
    (notice,) = notices_of(events)
    assert notice.startswith("its thinking could not be changed: there is nothing at")
    assert text_of(events) == "4"


async def test_endpoint_without_control_says_that_it_cannot() -> None:
    async with talking(thinking_stream(10)) as (engine, endpoint):
        generation = engine.generate(QUESTION, GenerateOptions())
        events = [await anext(generation)]
        await generation.finish_thinking()
        events += [event async for event in generation]
    assert notices_of(events) == ["this endpoint cannot be told to think less while it thinks"]
    assert endpoint.controls == []


async def test_control_after_the_thinking_changes_nothing() -> None:
    async with talking(ENDLESS) as (engine, _):
        generation = engine.generate(QUESTION, GenerateOptions())
        await anext(generation)
        await generation.finish_thinking()
        await generation.set_budget(3)
        assert isinstance(await anext(generation), TextDelta)
        await generation.aclose()


async def test_effort_that_an_endpoint_does_not_know_is_left_out() -> None:
    refused = Answer.json({"error": {"message": "Unrecognized argument: reasoning_effort"}}, 400)
    async with talking(refused, Answer.stream(*WHOLE)) as (engine, endpoint):
        first, second = (
            await ask(engine, think=LOW),
            await ask(engine, think=LOW),
        )
    assert text_of(first) == text_of(second) == "4"
    efforts = [request.body.get("reasoning_effort") for request in endpoint.requests]
    assert efforts == ["low", None, None]
    assert ["takes no reasoning depth" in text for text in notices_of(first)] == [True]


def refusal(message: str = "no", status: int = 400, **fields: Any) -> Answer:
    return Answer.json({"error": {"message": message, **fields}}, status)


@pytest.mark.parametrize(
    "refused",
    [
        refusal('"llama" does not support thinking', type="invalid_request_error", param=None),
        refusal(param="reasoning_effort", code="unsupported_value"),
        refusal(status=422),
        Answer.json({"detail": [{"loc": ["body", "reasoning_effort"], "msg": "extra"}]}, 422),
    ],
)
async def test_request_is_sent_again_without_effort_whatever_words_refuse_it(
    refused: Answer,
) -> None:
    async with talking(refused, Answer.stream(*WHOLE)) as (engine, endpoint):
        events = await ask(engine)
    assert text_of(events) == "4"
    first, second = (request.body for request in endpoint.requests)
    assert first == {**second, "reasoning_effort": "medium"}


@pytest.mark.parametrize(
    "refused",
    [
        refusal("thinking has no place beside tools", param="tools"),
        Answer.json({"detail": [{"loc": ["body", "seed"], "msg": "too large"}]}, 422),
        refusal(status=500),
        refusal(code="context_length_exceeded"),
    ],
)
async def test_refusal_of_something_else_is_told_at_once(refused: Answer) -> None:
    async with talking(refused) as (engine, endpoint):
        with pytest.raises(NanorunError):
            await ask(engine)
    assert len(endpoint.requests) == 1


async def test_effort_is_asked_again_where_leaving_it_out_did_not_help() -> None:
    answers = refusal("a"), refusal("top_k is not known"), Answer.stream(*WHOLE)
    async with talking(*answers) as (engine, endpoint):
        with pytest.raises(UsageError) as caught:
            await ask(engine)
        events = await ask(engine)
    assert caught.value.facts == ("top_k is not known",)
    efforts = [request.body.get("reasoning_effort") for request in endpoint.requests]
    assert efforts == ["medium", None, "medium"]
    assert notices_of(events) == []


async def test_refusal_inside_an_answer_is_not_asked_again() -> None:
    broken = Answer([sse(delta(content="4"), {"error": {"message": "no", "code": 400}})])
    async with talking(broken) as (engine, endpoint):
        with pytest.raises(UsageError):
            await ask(engine)
    assert len(endpoint.requests) == 1


async def test_budget_that_an_endpoint_cannot_take_is_said() -> None:
    async with talking(Answer.stream(*WHOLE)) as (engine, endpoint):
        events = await ask(engine, think=Think(700))
    assert endpoint.requests[0].body["reasoning_effort"] == "medium"
    assert "takes no budget of thinking tokens; effort 'medium'" in notices_of(events)[0]


# --- raw prompts ----------------------------------------------------------------------------


def old_chunk(text: str, reason: str | None = None) -> dict[str, Any]:
    """A chunk of an old completion."""
    return {"id": "cmpl-1", "choices": [{"index": 0, "text": text, "finish_reason": reason}]}


async def go_on(engine: RemoteClient, prompt: RawPrompt, **options: Any) -> list[Event]:
    return [event async for event in engine.generate(prompt, GenerateOptions(**options))]


@pytest.mark.parametrize("model", [VLLM_MODEL, NANORUN_MODEL, OTHER_MODEL])
async def test_raw_prompt_goes_to_the_route_for_them(model: Any) -> None:
    answer = Answer.stream(old_chunk("\n<think> 4"), old_chunk(" \n", "length"), usage(7, 3))
    async with talking(answer, models=[model]) as (engine, endpoint):
        events = await go_on(engine, RawPrompt("2+2="), max_tokens=3, stop=("x",))
        assert text_of(events) == "\n<think> 4 \n"
        assert (end_of(events).reason, end_of(events).usage.prompt_tokens) == ("length", 7)
        await go_on(engine, RawPrompt(tokens=(4, 5)))
        first, second = endpoint.requests
        assert first.path.endswith("/v1/completions")
        assert first.body["prompt"] == "2+2=" and second.body["prompt"] == [4, 5]
        assert (first.body["max_tokens"], first.body["stop"]) == (3, ["x"])
        assert "messages" not in first.body and "reasoning_effort" not in first.body


async def test_thinking_that_a_raw_prompt_opened_is_told_apart() -> None:
    answer = Answer.stream(old_chunk("so"), old_chunk("</think>\n4", "stop"))
    async with talking(answer, models=[VLLM_MODEL]) as (engine, _):
        events = await go_on(engine, RawPrompt("2+2?<think>\n"))
        assert (thinking_of(events), text_of(events)) == ("so", "4")


async def test_endpoint_without_the_route_takes_no_raw_prompts() -> None:
    answer = Answer.json({"error": {"message": "Not Found"}}, 404)
    async with talking(answer, models=[OTHER_MODEL]) as (engine, _):
        with pytest.raises(UsageError, match="takes no raw prompts: it has no completions"):
            await go_on(engine, RawPrompt("2+2="))


async def test_what_an_endpoint_has_no_words_for_is_refused_with_a_raw_prompt() -> None:
    async with talking(Answer(), models=[VLLM_MODEL]) as (engine, endpoint):
        for prompt, options in (
            (RawPrompt("a", special=False), {}),
            (RawPrompt("a", add_bos=False), {}),
            (RawPrompt("a"), {"tools": (TOOL,)}),
            (RawPrompt("a"), {"logprobs": 1}),
            (RawPrompt("a"), {"continue_final": True}),
        ):
            with pytest.raises(UsageError, match="cannot be asked of an endpoint with a raw"):
                await go_on(engine, prompt, **options)
        assert not endpoint.requests


# --- going on with the last message ---------------------------------------------------------------


async def test_continued_answer_is_text_whatever_the_endpoint_calls_it() -> None:
    answer = Answer.stream(delta(reasoning=" is"), delta(content=" 4"), delta("stop"))
    messages = [*QUESTION, Message("assistant", "It")]
    async with talking(answer, models=[VLLM_MODEL]) as (engine, endpoint):
        options = GenerateOptions(continue_final=True)
        events = [event async for event in engine.generate(messages, options)]
    assert (text_of(events), thinking_of(events)) == (" is 4", "")
    (request,) = endpoint.requests
    assert request.body["messages"][-1] == {"role": "assistant", "content": "It"}
    assert request.body["continue_final_message"] is True


async def test_question_is_not_continued() -> None:
    async with talking(Answer(), models=[VLLM_MODEL]) as (engine, endpoint):
        with pytest.raises(UsageError, match="the last is of role user"):
            await ask(engine, continue_final=True)
        assert not endpoint.requests
