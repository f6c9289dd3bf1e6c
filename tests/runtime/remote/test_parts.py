"""The parts of the remote engine that need no endpoint: addresses, bodies, bytes of streams."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorun.errors import EngineError, UsageError
from nanorun.model.chat import (
    Event,
    GenerateOptions,
    Grammar,
    Message,
    ToolCall,
    ToolCallBegun,
    ToolCallDelta,
)
from nanorun.model.sampling import NUMBERS
from nanorun.model.think import HIGH, LOW, MAX, OFF, Think
from nanorun.runtime.remote.dialect import (
    LLAMA_CPP,
    NANORUN,
    OPENAI,
    OTHER,
    VLLM,
    Dialect,
    dialect_of,
    effort_of,
    message_body,
    request_body,
)
from nanorun.runtime.remote.http import parse_address
from nanorun.runtime.remote.reply import RemoteReply
from nanorun.runtime.remote.sse import SseComment, SseData, SseDecoder, SseItem
from tests.runtime.remote.scripted_endpoint import delta, sse, usage

# --- addresses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "base", "shown"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080/v1", "127.0.0.1:8080"),
        ("127.0.0.1:8080", "http://127.0.0.1:8080/v1", "127.0.0.1:8080"),
        (" spark.local:8000/v1/ ", "http://spark.local:8000/v1", "spark.local:8000"),
        ("http://h:1/v1/chat/completions", "http://h:1/v1", "h:1"),
        ("https://x.example/api/v2", "https://x.example/api/v2", "x.example/api/v2"),
        ("https://x.example/api", "https://x.example/api/v1", "x.example/api"),
        ("http://[::1]:9", "http://[::1]:9/v1", "[::1]:9"),
    ],
)
def test_address_is_understood_however_it_is_written(text: str, base: str, shown: str) -> None:
    address = parse_address(text)
    assert (address.base, address.shown) == (base, shown)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no address"),
        ("ftp://h", "no address"),
        ("http://", "no address"),
        ("http://h:99999", "cannot be read"),
        ("http://h h", "no address"),
        ("http://user:hush@h", "holds a user, a password or a query"),
        ("http://h/v1?key=hush", "holds a user, a password or a query"),
    ],
)
def test_address_that_is_none_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse_address(text)
    assert "hush" not in caught.value.render()


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("[::1]", True), ("h", False)])
def test_address_knows_this_machine(host: str, local: bool) -> None:
    assert parse_address(f"http://{host}:1").is_loopback is local


# --- dialects -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "host", "dialect"),
    [
        ({"owned_by": "nanorun", "max_model_len": 8}, "h", NANORUN),
        ({"owned_by": "llamacpp"}, "h", LLAMA_CPP),
        ({"owned_by": "vllm"}, "h", VLLM),
        ({"owned_by": "nvidia", "max_model_len": 8}, "h", VLLM),
        ({"owned_by": "library"}, "h", OTHER),
        ({}, "h", OTHER),
        ({"owned_by": "system"}, "api.openai.com", OPENAI),
    ],
)
def test_dialect_is_told_by_the_model_list(model: Any, host: str, dialect: Dialect) -> None:
    assert dialect_of(model, host) is dialect


KEEP = {"truncate_history_thinking": False}


def body_of(dialect: Dialect, **options: Any) -> dict[str, Any]:
    return request_body(dialect, "m", [Message("user", "x")], GenerateOptions(**options))


def test_body_holds_what_was_chosen_and_nothing_else() -> None:
    body = body_of(
        OTHER, temperature=0.0, top_p=0.9, top_k=5, min_p=0.1, seed=3, stop=("a",), think=OFF,
        max_tokens=9, logit_bias=((13, -100.0),), tools=({"type": "function"},), ignore_eos=True,
    )  # fmt: skip
    assert body == {
        "model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True,
        "stream_options": {"include_usage": True}, "max_tokens": 9, "temperature": 0.0,
        "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "logit_bias": {"13": -100.0},
        "ignore_eos": True, "tools": [{"type": "function"}], "stop": ["a"],
        "reasoning_effort": "none",
    }  # fmt: skip
    plain = {"model", "messages", "stream", "stream_options"}
    assert set(body_of(VLLM)) == plain | {"chat_template_kwargs"}


@pytest.mark.parametrize(
    ("dialect", "options", "fields"),
    [
        (NANORUN, {"think": OFF}, {"reasoning_effort": "none"}),
        (NANORUN, {"think": HIGH}, {"reasoning_effort": "high"}),
        (NANORUN, {"think": Think(77)}, {"reasoning_budget": 77}),
        (NANORUN, {"priority": "background"}, {"service_tier": "flex"}),
        (NANORUN, {"keep_thinking": True}, {"chat_template_kwargs": KEEP}),
        (LLAMA_CPP, {"think": OFF}, {"chat_template_kwargs": {"enable_thinking": False}}),
        (LLAMA_CPP, {"think": MAX}, {"reasoning_control": True}),
        (LLAMA_CPP, {"think": Think(100)}, {"reasoning_budget_tokens": 132}),
        (LLAMA_CPP, {"think": Think(100), "max_tokens": 50}, {"reasoning_budget_tokens": 25}),
        (VLLM, {"think": LOW}, {"chat_template_kwargs": {"enable_thinking": True}}),
        (
            VLLM,
            {"think": OFF, "keep_thinking": True},
            {"chat_template_kwargs": {"enable_thinking": False, **KEEP}},
        ),
        (OPENAI, {"max_tokens": 5}, {"max_completion_tokens": 5}),
        (OTHER, {"think": MAX}, {"reasoning_effort": "high"}),
    ],
)  # fmt: skip
def test_depth_is_asked_in_the_endpoints_words(
    dialect: Dialect, options: dict[str, Any], fields: dict[str, Any]
) -> None:
    body = body_of(dialect, **options)
    assert {name: body.get(name) for name in fields} == fields


def test_llama_cpp_is_asked_for_no_budget_where_there_is_no_thinking() -> None:
    assert "reasoning_control" not in body_of(LLAMA_CPP, think=OFF)
    assert "reasoning_budget_tokens" not in body_of(LLAMA_CPP, think=MAX)


def test_stop_strings_go_to_endpoints_that_look_where_they_should() -> None:
    assert body_of(NANORUN, stop=("a",))["stop"] == ["a"]
    assert body_of(VLLM, stop=("a",), think=OFF)["stop"] == ["a"]
    assert "stop" not in body_of(VLLM, stop=("a",), think=LOW)


def test_penalties_go_by_the_endpoints_names() -> None:
    options = {"repetition_penalty": 1.1, "presence_penalty": 0.5}
    assert body_of(VLLM, **options).items() >= options.items()
    assert body_of(LLAMA_CPP, **options, dry_multiplier=0.8).items() >= {
        "repeat_penalty": 1.1, "presence_penalty": 0.5, "dry_multiplier": 0.8,
    }.items()  # fmt: skip
    body = body_of(OTHER, logprobs=2, frequency_penalty=0.1)
    assert (body["logprobs"], body["top_logprobs"], body["frequency_penalty"]) == (True, 2, 0.1)


@pytest.mark.parametrize("dialect", [NANORUN, LLAMA_CPP, VLLM, OPENAI, OTHER])
@pytest.mark.parametrize("name", NUMBERS)
def test_every_sampling_value_is_asked_or_refused(dialect: Dialect, name: str) -> None:
    try:
        body = body_of(dialect, **{name: 1})
    except UsageError:
        assert name in dialect.unknown_sampling
    else:
        assert body[dialect.sampling_names.get(name, name)] == 1


@pytest.mark.parametrize(
    ("dialect", "name"), [(VLLM, "dry_multiplier"), (OTHER, "repetition_penalty")]
)
def test_penalty_that_would_be_read_over_is_refused(dialect: Dialect, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} 0.5 cannot be asked of an endpoint of"):
        body_of(dialect, **{name: 0.5})


@pytest.mark.parametrize(
    ("budget", "effort"), [(0, "none"), (1, "low"), (512, "low"), (513, "medium"), (5000, "high")]
)
def test_effort_is_the_nearest_that_is_enough(budget: int, effort: str) -> None:
    assert effort_of(Think(budget)) == effort


def test_thinking_goes_back_only_where_it_is_wanted() -> None:
    turn = Message("assistant", "4", thinking="hm")
    keep, echo = GenerateOptions(keep_thinking=True, echo_thinking=False), GenerateOptions()
    neither = GenerateOptions(echo_thinking=False)
    bodies = [request_body(VLLM, "m", [turn], o)["messages"][0] for o in (keep, echo, neither)]
    assert [body.get("reasoning") for body in bodies] == ["hm", "hm", None]
    assert bodies[0]["reasoning_content"] == "hm"
    assert set(bodies[2]) == {"role", "content"}


def test_last_message_is_continued_in_words_that_the_endpoint_knows() -> None:
    answer, thinking = Message("assistant", "It is"), Message("assistant", thinking="so")
    options = GenerateOptions(continue_final=True, echo_thinking=False)
    for dialect in (NANORUN, LLAMA_CPP, VLLM):
        body = request_body(dialect, "m", [answer], options)
        assert (body["add_generation_prompt"], body["continue_final_message"]) == (False, True)
    body = request_body(NANORUN, "m", [thinking], options)
    assert body["messages"][0]["reasoning_content"] == "so"
    for dialect, last, says in (
        (OPENAI, answer, "to continue the last message"),
        (OTHER, answer, "to continue the last message"),
        (VLLM, thinking, "to continue thinking"),
        (LLAMA_CPP, thinking, "to continue thinking"),
    ):
        with pytest.raises(UsageError, match=says):
            request_body(dialect, "m", [last], options)


def test_tool_calls_and_results_are_openais() -> None:
    turn = Message("assistant", tool_calls=(ToolCall("c", "f", {"a": "ü"}), ToolCall("", "g", {})))
    body = message_body(turn)
    assert body["content"] is None
    assert body["tool_calls"] == [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "ü"}'}},
        {"id": "call_1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    result = message_body(Message("tool", "4", tool_call_id="c"))
    assert result == {"role": "tool", "content": "4", "tool_call_id": "c"}


# --- bytes ----------------------------------------------------------------------------------


def items_of(*pieces: bytes) -> list[SseItem]:
    decoder = SseDecoder()
    items = [item for piece in pieces for item in decoder.feed(piece)]
    return items + decoder.finish()


@pytest.mark.parametrize(
    ("stream", "items"),
    [
        (b"data: a\n\n", [SseData("a")]),
        (b"data:a\r\n\r\ndata:  b\r\rdata\n\n", [SseData("a"), SseData(" b"), SseData("")]),
        (b"data: a\ndata: b\n\n", [SseData("a\nb")]),
        (b"\xef\xbb\xbfdata: a\n\n", [SseData("a")]),
        (b": hello\n\n:\n", [SseComment("hello"), SseComment("")]),
        (b"event: x\nid: 3\nretry: 5\ndata: a\n\n", [SseData("a")]),
        (b"event: x\n\n\n\n", []),
        (b"data: a", [SseData("a")]),
        (b"data: \xff\n\n", [SseData("\ufffd")]),
        (b"", []),
    ],
)
def test_stream_is_split_into_events(stream: bytes, items: list[SseItem]) -> None:
    assert items_of(stream) == items


@pytest.mark.parametrize("stream", [b"x" * 11, b"data: 1234\ndata: 1234\n", b"xxxxxxxxxxx\n"])
def test_stream_has_no_endless_lines_and_events(stream: bytes) -> None:
    with pytest.raises(EngineError, match="longer than 10 bytes"):
        SseDecoder(max_bytes=10).feed(stream)


SCRIPT = [
    delta(role="assistant", content=""),
    delta(reasoning="\nüber "), delta(reasoning="x²\n"), delta(content="4 <"),
    delta(content="b> 日本"), delta(content="<tool_call>{}"), delta(content="END no"),
    delta(tool_calls=[{"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"a'}}]),
    delta(tool_calls=[{"index": 0, "function": {"arguments": '": 1}'}}]),
    delta("tool_calls"), usage(3, 9), "[DONE]",
]  # fmt: skip


def events_of(stream: list[bytes], options: GenerateOptions) -> list[Event]:
    reply = RemoteReply(VLLM, options, "http://h/v1")
    events = [event for item in items_of(*stream) for event in reply.take(item)]
    events += reply.finish()[:-1]  # the last one holds measured times
    return [_without_id(event) for event in events]


def _without_id(event: Event) -> Event:
    """The event without the id that a tool call in the text is given at random."""
    if isinstance(event, ToolCallBegun):
        return replace(event, id="")
    if not isinstance(event, ToolCallDelta):
        return event
    return replace(event, call=replace(event.call, id=""))


@given(
    cuts=st.lists(st.integers(0, 2000), max_size=40), ending=st.sampled_from(["\n", "\r\n", "\r"])
)
@settings(max_examples=300, deadline=None)
def test_any_split_of_the_bytes_gives_the_same_events(cuts: list[int], ending: str) -> None:
    text = b": hello\n\n" + sse(*SCRIPT).replace(b"\n", ending.encode())
    places = sorted({0, len(text), *(cut % len(text) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert items_of(*pieces) == items_of(text)
    options = GenerateOptions(stop=("END",))
    assert events_of(pieces, options) == events_of([text], options)
    assert len(events_of([text], options)) > 4


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=10))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_split_alike(stream: bytes, cuts: list[int]) -> None:
    places = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    pieces = [stream[a:b] for a, b in pairwise(places)]
    assert items_of(*pieces) == items_of(stream)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["choices", "delta", "content", "reasoning", "tool_calls", "function", "arguments",
             "text", "type", "thinking", "index", "id", "name", "usage", "finish_reason",
             "prompt_tokens_details", "timings"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=25,
)  # fmt: skip


@given(st.lists(json_values, max_size=5))
@settings(max_examples=300, deadline=None)
def test_any_chunks_are_read_or_refused(chunks: list[Any]) -> None:
    reply = RemoteReply(OTHER, GenerateOptions(), "http://h/v1")
    for chunk in chunks:
        try:
            reply.take(SseData(json.dumps(chunk)))
        except EngineError as error:
            assert not isinstance(chunk, dict), error
    reply.finish()


def test_forms_go_in_the_words_of_the_endpoint() -> None:
    schema = Grammar("json_schema", '{"type": "null"}')
    body = body_of(OTHER, grammar=schema)
    assert body["response_format"]["json_schema"]["schema"] == {"type": "null"}
    assert body_of(VLLM, grammar=Grammar("regex", "a"))["structured_outputs"] == {"regex": "a"}
    with pytest.raises(UsageError, match=r"kind lark cannot be asked of an endpoint of llama\.cpp"):
        body_of(LLAMA_CPP, grammar=Grammar("lark", "start: X"))
    with pytest.raises(UsageError, match="no JSON schema"):
        body_of(OTHER, grammar=Grammar("json_schema", "{"))


def test_demanded_calls_are_demanded_of_the_endpoint() -> None:
    tools = ({"type": "function", "function": {"name": "f"}},)
    body = body_of(VLLM, tools=tools, tool_choice="required", parallel_tool_calls=False)
    assert (body["tool_choice"], body["parallel_tool_calls"]) == ("required", False)
    assert "tool_choice" not in body_of(VLLM, tools=tools)
