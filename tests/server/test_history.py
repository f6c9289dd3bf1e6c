from __future__ import annotations

from typing import Any

import pytest

from nanorun.model.chat import Message, ToolCall
from nanorun.server.errors import ApiError
from nanorun.server.history import read_messages


def past(**fields: Any) -> tuple[Message, tuple[str, ...]]:
    """A message as it stands before a reply, and the notices."""
    closing = [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "go on"}]
    messages, notices = read_messages([fields, *closing])
    return messages[0], notices


def call(**fields: Any) -> ToolCall:
    """The call that the model sees of a past one."""
    message, _ = past(role="assistant", content=None, tool_calls=[fields])
    return message.tool_calls[0]


@pytest.mark.parametrize(
    ("arguments", "seen", "is_told"),
    [
        ('{"a": 1}', {"a": 1}, False),
        ({"a": 1}, {"a": 1}, False),
        ("", {}, False),
        (None, {}, False),
        ("null", {}, False),
        ("[]", {"arguments": []}, True),
        ("[1]", {"arguments": [1]}, True),
        ([], {"arguments": []}, True),
        (7, {"arguments": 7}, True),
        ('{"city": "Par', {"city": "Par"}, True),
        ('{"a": 1, "b', {"a": 1}, True),
        ('{"a": {"b": 1}', {"a": {"b": 1}}, True),
        ('{"a": 1} {"b": 2}', {"arguments": '{"a": 1} {"b": 2}'}, True),
        ("city=Paris", {"arguments": "city=Paris"}, True),
        ("[" * 100_000, {"arguments": "[" * 100_000}, True),
    ],
)
def test_arguments_of_any_kind_are_shown(
    arguments: Any, seen: dict[str, Any], is_told: bool
) -> None:
    function = {"name": "f", "arguments": arguments}
    message, notices = past(role="assistant", tool_calls=[{"id": "c", "function": function}])
    assert message.tool_calls == (ToolCall("c", "f", seen),)
    assert bool(notices) == is_told


def test_call_without_this_and_that_is_shown() -> None:
    function = {"name": "f", "arguments": "{}"}
    assert call(id=None, type=None, function=function) == ToolCall("", "f", {})
    assert call(id=7, function={"name": "f"}) == ToolCall("7", "f", {})
    assert call(name="f", arguments="{}") == ToolCall("", "f", {})


def test_old_function_call_and_its_result_are_a_call_and_its_result() -> None:
    old = {"name": "f", "arguments": '{"a": 1}'}
    assert past(role="assistant", function_call=old)[0].tool_calls == (ToolCall("", "f", {"a": 1}),)
    assert past(role="function", name="f", content="3")[0] == Message("tool", "3")
    assert past(role="tool", tool_call_id=5, content="3")[0] == Message(
        "tool", "3", tool_call_id="5"
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"sum": 5}, '{"sum": 5}'),
        (5, "5"),
        (True, "true"),
        (None, ""),
        (["5"], "5"),
        ([{"text": "5"}], "5"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([{"type": "input_text", "text": "5"}], "5"),
        ([{"type": "output_text", "text": "5"}], "5"),
        ([{"type": "tool_result", "content": [{"type": "text", "text": "5"}]}], "5"),
        ([{"name": "x"}, {"name": "y"}], '[{"name": "x"}, {"name": "y"}]'),
        ([1, 2], "[1, 2]"),
        ([], ""),
    ],
)
def test_result_of_a_tool_may_be_any_json(content: Any, text: str) -> None:
    assert past(role="tool", content=content)[0].content == text


@pytest.mark.parametrize("content", [["hi"], ["hi", None], {"type": "text", "text": "hi"}, "hi"])
def test_content_of_a_user_comes_in_many_forms(content: Any) -> None:
    assert past(role="user", content=content)[0].content == "hi"


@pytest.mark.parametrize("kind", ["thinking", "reasoning"])
def test_thinking_in_parts_is_thinking(kind: str) -> None:
    parts = [{"type": kind, kind: "2+2"}, {"type": "text", "text": "4"}]
    assert past(role="assistant", content=parts)[0] == Message("assistant", "4", "2+2")


def test_blank_text_beside_calls_is_none() -> None:
    calls = [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]
    assert past(role="assistant", content="\n", tool_calls=calls)[0].content == ""
    assert past(role="assistant", content="\n")[0].content == "\n"


def test_picture_of_the_past_is_left_out_and_told_once() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:"}}
    message, notices = past(role="user", content=[picture, {"type": "text", "text": "?"}, picture])
    assert message.content == "[image_url left out]?[image_url left out]"
    assert len(notices) == 1


def test_picture_that_is_asked_about_is_refused() -> None:
    asked = [
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": [{"type": "image"}]},
    ]
    with pytest.raises(ApiError) as caught:
        read_messages(asked)
    assert caught.value.param == "messages[1].content[0]"


def test_part_of_an_unknown_kind_is_shown_as_it_is() -> None:
    message, notices = past(role="user", content=[{"type": "widget", "size": 3}])
    assert message.content == '{"type": "widget", "size": 3}'
    assert "widget" in notices[0]


def test_calls_of_a_user_are_left_out() -> None:
    message, notices = past(role="user", content="x", tool_calls=[{"function": {"name": "f"}}])
    assert message == Message("user", "x")
    assert "left out" in notices[0]


def test_half_of_a_character_is_replaced() -> None:
    assert past(role="user", content="a\ud800b")[0].content == "a\ufffdb"
    assert past(role="user", content="\ud83d\ude00")[0].content == "\U0001f600"
