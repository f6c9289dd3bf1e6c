"""The items of a conversation in /v1/responses, as nanorun's messages.

A reply is several items there (reasoning, message, calls) and one message here. Instructions and
system messages before the first reply are joined in front, in their order: there they stay the same
from turn to turn and from session to session, and so does the prompt state that they cost.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from nanorun.model.chat import Message, ToolCall
from nanorun.server.history import ROLES, SYSTEM_JOINT, History

CUSTOM_ARGUMENT = "input"
"""The one parameter of a tool that takes free text."""
_SEALED = "nanorun1."
"""Begins `encrypted_content` that is ours."""

Item = Mapping[str, Any]


def seal(thinking: str) -> str:
    """Thinking as `encrypted_content`: it comes back usable, and is no secret from its owner."""
    return _SEALED + base64.b64encode(thinking.encode()).decode()


def unseal(sealed: Any) -> str | None:
    """The thinking in `encrypted_content`; None if another server made it."""
    if not isinstance(sealed, str) or not sealed.startswith(_SEALED):
        return None
    try:
        return base64.b64decode(sealed.removeprefix(_SEALED), validate=True).decode()
    except ValueError:
        return None


def namespaced(namespace: Any, name: Any) -> str:
    """The name by which the model knows a tool of a namespace."""
    return f"{namespace}.{name}" if namespace else str(name or "unknown")


def kind_of(item: Item) -> str:
    """What an item is; one that only has a role is a message."""
    kind = item.get("type")
    return "message" if kind is None and "role" in item else str(kind)


def is_of_reply(item: Item) -> bool:
    """Whether the model said it."""
    kind = kind_of(item)
    if kind == "message":
        return item.get("role") == "assistant"
    return kind == "reasoning" or kind.endswith("_call")


def read_items(
    instructions: str | None, items: Sequence[Item]
) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The conversation, and what of it was taken otherwise than it was sent.

    Args:
        instructions: The system prompt of this request.
        items: Everything said so far, references resolved.

    Raises:
        ApiError: If a role is unknown, or what is asked now cannot be read.
    """
    said = [i for i, item in enumerate(items) if is_of_reply(item)]
    reader = _Reader(History(said[-1] + 1 if said else 0, field="input"))
    first_said = said[0] if said else len(items)
    opening = {i for i in range(first_said) if _is_system(items[i])}
    texts = [instructions or "", *(reader.text_of(i, items[i]) for i in sorted(opening))]
    front = SYSTEM_JOINT.join(text for text in texts if text)
    for i, item in enumerate(items):
        if i not in opening:
            reader.read(i, item)
    messages = reader.ended()
    system = (Message("system", front),) if front else ()
    return (*system, *messages), reader.history.notices


def _is_system(item: Item) -> bool:
    return kind_of(item) == "message" and ROLES.get(str(item.get("role"))) == "system"


class _Reader:
    """Reads items one after the other; those of one reply become one message."""

    def __init__(self, history: History) -> None:
        self.history = history
        self._messages: list[Message] = []
        self._thinking, self._content = "", ""
        self._calls: list[ToolCall] = []

    def ended(self) -> tuple[Message, ...]:
        """All messages, once every item was read."""
        self._end_reply()
        return tuple(self._messages)

    def text_of(self, i_item: int, item: Item) -> str:
        """The text of a message."""
        return self.history.read(i_item, _chat_form(item)).content

    def read(self, i_item: int, item: Item) -> None:
        """Take the next item.

        Raises:
            ApiError: As `History.read`.
        """
        kind = kind_of(item)
        if kind == "message":
            self._read_message(i_item, item)
        elif kind == "reasoning":
            self._read_reasoning(item)
        elif kind in ("function_call", "custom_tool_call"):
            self._read_call(item)
        elif kind.endswith("_output") and item.get("call_id") is not None:
            self._read_result(i_item, item)
        elif kind.endswith("_call") and item.get("call_id") is not None:
            self._read_vendors_call(kind, item)
        else:
            self.history.note(f"items of type {kind!r} were left out")

    def _read_message(self, i_item: int, item: Item) -> None:
        message = self.history.read(i_item, _chat_form(item))
        if message.role != "assistant":
            self._end_reply()
            self._messages.append(message)
            return
        if self._content or self._calls:
            self._end_reply()
        self._content = message.content
        self._thinking += message.thinking or ""

    def _read_reasoning(self, item: Item) -> None:
        if self._content or self._calls:
            self._end_reply()
        texts = self.history.content(item.get("content"))
        thinking = "".join(texts) or unseal(item.get("encrypted_content")) or ""
        self._thinking += thinking or "".join(self.history.content(item.get("summary")))
        if item.get("encrypted_content") and not self._thinking:
            self.history.note("reasoning that another server encrypted was left out")

    def _read_call(self, item: Item) -> None:
        name = namespaced(item.get("namespace"), item.get("name"))
        if kind_of(item) == "custom_tool_call":
            arguments = {CUSTOM_ARGUMENT: str(item.get("input") or "")}
        else:
            arguments = self.history.arguments(item.get("arguments"), name)
        self._calls.append(
            ToolCall(str(item.get("call_id") or item.get("id") or ""), name, arguments)
        )

    def _read_vendors_call(self, kind: str, item: Item) -> None:
        """A call of a tool that clients run themselves (`local_shell_call`): its fields stay."""
        bookkeeping = ("type", "id", "call_id", "status")
        arguments = {key: value for key, value in item.items() if key not in bookkeeping}
        self._calls.append(ToolCall(str(item["call_id"]), kind.removesuffix("_call"), arguments))

    def _read_result(self, i_item: int, item: Item) -> None:
        self._end_reply()
        raw = {"role": "tool", "content": item.get("output"), "tool_call_id": item["call_id"]}
        self._messages.append(self.history.read(i_item, raw))

    def _end_reply(self) -> None:
        if self._content or self._calls or self._thinking:
            # Blank text beside calls is an artefact of clients; verbatim, it would cost the prefix.
            content = "" if self._calls and not self._content.strip() else self._content
            thinking = self._thinking or None
            self._messages.append(Message("assistant", content, thinking, tuple(self._calls)))
        self._thinking, self._content, self._calls = "", "", []


def _chat_form(item: Item) -> dict[str, Any]:
    return {"role": item.get("role"), "content": item.get("content")}
