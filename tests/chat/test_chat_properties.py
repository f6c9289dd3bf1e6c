"""What holds for any text: no message forges a control token, no reply breaks the parser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from nanorun.chat.parser import ReplyParser
from nanorun.chat.prompt import RenderedPrompt
from nanorun.chat.template import ChatTemplate
from nanorun.model.chat import Message, TextDelta, ToolCall, ToolCallDelta
from tests.chat.conftest import CONTROL_TOKENS

RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=20)


# -- prompts --------------------------------------------------------------------------------------

SPELLING = st.sampled_from(
    [
        *("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "<s>", "</s>"),
        *("<", ">", "</", "|", "im_end", "think", "s", "<|im_end|", "think>", "\n", " ", "a"),
        *("\ud800", "\udfff", "\U000f0000"),
    ]
)
TYPED = st.lists(SPELLING, max_size=6).map("".join) | st.text(max_size=6)


def conversation(template: ChatTemplate, texts: list[str], keys: list[str]) -> RenderedPrompt:
    """A prompt with texts wherever somebody has a say, and keys wherever a key can be chosen."""
    a, b, c, d = texts
    k, m, name = keys
    call = ToolCall("1", name, {k: a, m: [b, {k: c}]})
    tool = {
        "name": name,
        "description": a,
        "parameters": {"properties": {k: {m: b, "enum": [c]}}, "required": [k], m: {k: d}},
        k: d,
    }
    messages = [
        Message("system", a),
        Message("user", b),
        Message("assistant", f"-{c}", thinking=f"-{d}", tool_calls=(call,)),
        Message("tool", d),
        Message("assistant", f"-{a}"),
        Message("user", c),
        Message("assistant", f"-{b}", thinking=f"-{c}", tool_calls=(call,)),
    ]
    return template.render(messages, tools=[tool], enable_thinking=True)


@pytest.fixture(scope="module")
def control_ids(tokenizer_file: Path) -> Any:
    """The control tokens of a prompt, tokenized segment by segment."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    known = {tokenizer.token_to_id(token) for token in CONTROL_TOKENS}

    def of(prompt: RenderedPrompt) -> list[int]:
        ids: list[int] = []
        for stretch in prompt.stretches():
            for segment in stretch:
                tokenizer.encode_special_tokens = not segment.special
                ids += tokenizer.encode(segment.text, add_special_tokens=False).ids
        return [i for i in ids if i in known]

    return of


@settings(RELAXED, max_examples=400)
@given(
    texts=st.lists(TYPED, min_size=4, max_size=4),
    keys=st.lists(TYPED, min_size=3, max_size=3, unique=True),
)
@example(texts=["<|im_end|>"] * 4, keys=["think", "/think", "a<|im_end|"])
@example(texts=["", "", "", ""], keys=["a><think", "think><think", "|im_end|"])
def test_no_message_forges_a_control_token(
    template: ChatTemplate, control_ids: Any, texts: list[str], keys: list[str]
) -> None:
    # The ends keep keys from being equal, and from being those that templates look for.
    odd = [f"{key}{i}" if i % 2 else f"{i}{key}" for i, key in enumerate(keys, 1)]
    plain = conversation(template, ["t"] * 4, ["1k", "k2", "3k"])
    prompt = conversation(template, texts, odd)
    assert control_ids(prompt) == control_ids(plain)
    assert len(prompt.boundaries) == len(plain.boundaries) == 3
    assert prompt.text.encode()


# -- tool calls -----------------------------------------------------------------------------------


def tool(**properties: Any) -> dict[str, Any]:
    return {"name": "f", "parameters": {"type": "object", "properties": properties}}


def calls(text: str, tools: Any) -> list[tuple[str, dict[str, Any], str | None]]:
    parser = ReplyParser(starts_in_thinking=False, tools=tools)
    events = parser.feed(text.encode("utf-8", "replace")) + parser.finish()
    assert parser.n_tool_calls == sum(isinstance(event, ToolCallDelta) for event in events)
    return [
        (event.call.name, event.call.arguments, event.problem)
        for event in events
        if isinstance(event, ToolCallDelta)
    ]


def called(x: str) -> str:
    """A call as Nemotron writes it."""
    return f"<tool_call>\n<function=f>\n<parameter=x>\n{x}\n</parameter>\n</function>\n</tool_call>"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
SCHEMA = st.recursive(
    JSON,
    lambda inner: st.dictionaries(
        st.sampled_from(["type", "anyOf", "oneOf", "allOf", "enum", "const", "$ref", "nullable"]),
        inner | st.sampled_from(["string", "integer", "#/properties/a"]) | st.lists(inner),
        max_size=3,
    ),
    max_leaves=6,
)
ODD_FIELDS = st.dictionaries(
    st.sampled_from(["required", "additionalProperties", "type", "$defs", "properties"]), JSON
)
ODD_TOOL = JSON | st.builds(
    lambda a, b, fields: {"name": "f", "parameters": {**tool(a=a, b=b)["parameters"], **fields}},
    SCHEMA,
    SCHEMA,
    ODD_FIELDS,
)
PIECE = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<function=", "<function=f>", "</function>", "</think>"),
        *("<parameter=", "<parameter=a>", "<parameter=b>\n", "</parameter>", "</parameter"),
        *('{"name": "f", "arguments": ', "{", "}", "[", "]", '"', ":", ",", "NaN", "1e999"),
        *("1", "true", "\\", "\n", " ", "a", ">", "<", "=", "漢", "\ud800", "```json\n"),
    ]
)


def test_odd_tools_and_texts_give_calls_that_can_be_passed_on() -> None:
    n_calls = 0

    @settings(RELAXED, max_examples=1500)
    @given(
        body=st.lists(PIECE | JSON.map(json.dumps), max_size=12).map("".join),
        tools=st.lists(ODD_TOOL, max_size=2),
    )
    def check(body: str, tools: list[Any]) -> None:
        nonlocal n_calls
        for name, arguments, problem in calls(f"<tool_call>{body}</tool_call>", tools):
            assert name or problem
            json.dumps(arguments, allow_nan=False).encode()
            n_calls += 1

    check()
    assert n_calls > 100  # a text may hold none; not all may


@settings(RELAXED, max_examples=800)
@given(text=TEXT)
def test_any_string_comes_through(text: str) -> None:
    # The tags of calls inside values have a table of their own, in test_tool_calls.py.
    assume(
        not any(tag in text for tag in ("<parameter", "</parameter", "</function", "tool_call>"))
    )
    assert calls(called(text), [tool(x={"type": "string"})]) == [("f", {"x": text}, None)]


@settings(RELAXED, max_examples=800)
@given(value=JSON)
def test_any_json_comes_through(value: Any) -> None:
    for ensure_ascii in (True, False):
        body = json.dumps({"name": "f", "arguments": {"x": value}}, ensure_ascii=ensure_ascii)
        assert calls(f"<tool_call>{body}</tool_call>", [tool(x={})]) == [("f", {"x": value}, None)]
    if not isinstance(value, str):
        assert calls(called(json.dumps(value)), [tool(x={})]) == [("f", {"x": value}, None)]


@settings(RELAXED, max_examples=800)
@given(text=st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"])))
def test_text_without_tags_arrives_as_it_is(text: str) -> None:
    parser = ReplyParser(starts_in_thinking=False, tools=[tool()])
    events = parser.feed(text.encode()) + parser.finish()
    said = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert said == text.lstrip("\n").rstrip()
