from __future__ import annotations

from typing import Any

import pytest

from nanorun.model.chat import Message, ToolCall
from nanorun.server.errors import ApiError
from nanorun.server.openai.responses.items import read_items, seal, unseal


def user(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def said(text: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "role": "assistant", "id": "msg_1", "content": content}


def thought(text: str, **fields: Any) -> dict[str, Any]:
    return {"type": "reasoning", "id": "rs_1", "summary": [], "content": [
        {"type": "reasoning_text", "text": text}], **fields}  # fmt: skip


def call(name: str = "add", arguments: str = '{"a": 1}', **fields: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": "call_1", "name": name, "arguments": arguments,
            **fields}  # fmt: skip


def result(output: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": "call_1", "output": output}


def test_items_of_one_reply_are_one_message() -> None:
    items = [user("hi"), thought("hm"), said("I add"), call(), result("1"), said("done")]
    messages, notices = read_items(None, items)
    assert messages == (
        Message("user", "hi"),
        Message("assistant", "I add", "hm", (ToolCall("call_1", "add", {"a": 1}),)),
        Message("tool", "1", tool_call_id="call_1"),
        Message("assistant", "done"),
    )
    assert notices == ()


def test_next_reply_begins_with_its_own_thinking() -> None:
    items = [user("a"), thought("1"), said("x"), thought("2"), said("y"), said("z")]
    messages, _ = read_items(None, items)
    assert [(m.thinking, m.content) for m in messages[1:]] == [("1", "x"), ("2", "y"), (None, "z")]


def test_system_texts_before_the_first_reply_are_joined_in_front() -> None:
    """Codex's shape; what follows a reply stays where it is."""
    developer = [{"type": "message", "role": "developer", "content": text} for text in "abc"]
    items = [developer[0], user("env"), developer[1], user("q"), said("r"), developer[2], user("s")]
    messages, _ = read_items("you are", items)
    assert [(m.role, m.content) for m in messages] == [
        ("system", "you are\n\na\n\nb"), ("user", "env"), ("user", "q"), ("assistant", "r"),
        ("system", "c"), ("user", "s"),
    ]  # fmt: skip


@pytest.mark.parametrize("place", ["content", "summary", "encrypted_content"])
def test_thinking_comes_back_from_wherever_it_stands(place: str) -> None:
    item: dict[str, Any] = {"type": "reasoning", "id": "rs_1", "summary": []}
    item[place] = seal("hm ü") if place == "encrypted_content" else [
        {"type": f"{place}_text".replace("content", "reasoning"), "text": "hm ü"}]  # fmt: skip
    messages, notices = read_items(None, [user("q"), item, said("r")])
    assert messages[1] == Message("assistant", "r", "hm ü")
    assert notices == ()


def test_thinking_that_stands_in_two_places_is_read_once() -> None:
    item = thought("hm", summary=[{"type": "summary_text", "text": "hm"}],
                   encrypted_content=seal("hm"))  # fmt: skip
    messages, _ = read_items(None, [user("q"), item, said("r")])
    assert messages[1].thinking == "hm"


def test_thinking_that_another_server_sealed_is_told() -> None:
    item = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAABo"}
    messages, notices = read_items(None, [user("q"), item, said("r")])
    assert messages[1] == Message("assistant", "r")
    assert notices == ("reasoning that another server encrypted was left out",)
    assert unseal("nanorun1.§") is None


def test_custom_and_namespaced_and_vendors_calls_keep_their_names() -> None:
    items = [
        user("q"),
        {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": "*** Begin"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "ok"},
        call("list", "{}", namespace="files"),
        result([{"type": "input_text", "text": "a b"}]),
        {"type": "local_shell_call", "call_id": "c3", "action": {"command": ["ls"]}, "id": "x"},
        {"type": "local_shell_call_output", "call_id": "c3", "output": "f"},
    ]
    messages, notices = read_items(None, items)
    calls = [(c.name, c.arguments) for m in messages for c in m.tool_calls]
    assert calls == [("patch", {"input": "*** Begin"}), ("files.list", {}),
                     ("local_shell", {"action": {"command": ["ls"]}})]  # fmt: skip
    assert [m.content for m in messages if m.role == "tool"] == ["ok", "a b", "f"]
    assert notices == ()


@pytest.mark.parametrize("arguments", ['{"a": 1, "b', "", None, "12", {"a": 1}])
def test_whatever_stands_in_past_calls_goes_on(arguments: Any) -> None:
    messages, _ = read_items(None, [user("q"), call(arguments=arguments), result(None)])
    assert messages[1].tool_calls[0].name == "add"
    assert messages[2].role == "tool"


def test_item_of_an_unknown_type_is_left_out_and_told() -> None:
    search = {"type": "web_search_call", "id": "ws_1"}
    messages, notices = read_items(None, [{"type": "compaction"}, search, user("q")])
    assert messages == (Message("user", "q"),)
    assert notices == ("items of type 'compaction' were left out",
                       "items of type 'web_search_call' were left out")  # fmt: skip


def test_picture_that_is_asked_about_is_refused_and_one_of_the_past_is_not() -> None:
    picture = {"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}
    with pytest.raises(ApiError, match=r"input\[0\].content\[0\]: it is input_image"):
        read_items(None, [picture])
    messages, notices = read_items(None, [picture, said("nice"), user("q")])
    assert messages[0].content == "[input_image left out]"
    assert len(notices) == 1
