"""Past messages as data: whatever stands in them is rendered as well as it can be.

A conversation that holds one cut-off tool call or a number where a text was expected goes on. Only
what is asked now, after the last reply, is refused if the model cannot read it: a picture, a sound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pydantic_core import from_json

from nanorun.model.chat import Message, ToolCall
from nanorun.server.errors import ApiError, invalid

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
SYSTEM_JOINT = "\n\n"
"""Between two system texts that become one message."""
_TEXTS = frozenset({
    "text", "input_text", "output_text", "refusal", "summary_text", "reasoning_text",
})  # fmt: skip
_THINKING = frozenset({"thinking", "reasoning", "reasoning_content"})
_MEDIA = ("image", "audio", "video", "file", "document")


class History:
    """Reads messages one after the other, and notes what could not be taken as it was.

    Args:
        i_current: Index of the first message that is asked now; those before are past.
        field: Where the messages stand in the request, for errors.
    """

    def __init__(self, i_current: int = 0, field: str = "messages") -> None:
        self._i_current = i_current
        self._field = field
        self._i_message = 0
        self._notes: dict[str, None] = {}

    @property
    def notices(self) -> tuple[str, ...]:
        """What was taken otherwise than it was sent, each thing once."""
        return tuple(self._notes)

    def read(self, i_message: int, raw: Mapping[str, Any]) -> Message:
        """One message of OpenAI's form.

        Raises:
            ApiError: If its role is unknown, or it asks now about what the model cannot read.
        """
        self._i_message = i_message
        role = ROLES.get(str(raw.get("role")))
        if role is None:
            known = ", ".join(repr(name) for name in ROLES)
            raise self._refused("role", f"{raw.get('role')!r} is none of {known}")
        text, thinking = self.content(raw.get("content"), is_result=role == "tool")
        if role != "assistant":
            called = raw.get("tool_call_id") if role == "tool" else None
            if raw.get("tool_calls"):
                self.note(f"tool_calls of role {role} were left out")
            return Message(
                role,  # type: ignore[arg-type]  # one of the values above
                text, tool_call_id=None if called is None else str(called),
            )  # fmt: skip
        calls = self._calls(raw)
        given = raw.get("reasoning_content") or raw.get("reasoning")
        if given is not None and not isinstance(given, str):
            given = "".join(self.content(given))
        # Blank text beside calls is an artefact of clients; verbatim, it would cost the prefix.
        text = "" if calls and not text.strip() else text
        return Message("assistant", text, given or thinking or None, calls)

    def content(self, value: Any, *, is_result: bool = False) -> tuple[str, str]:
        """The text of a message's content, and thinking that stands in it."""
        if isinstance(value, list) and not (is_result and not _has_parts(value)):
            texts = [self._part(part, f"content[{i}]") for i, part in enumerate(value)]
            return "".join(text for text, _ in texts), "".join(thought for _, thought in texts)
        if is_result and not isinstance(value, str | None) and _kind(value) not in _TEXTS:
            return _as_json(value), ""
        return self._part(value, "content")

    def _part(self, part: Any, where: str) -> tuple[str, str]:
        if part is None:
            return "", ""
        if isinstance(part, str):
            return _well_formed(part), ""
        if not isinstance(part, Mapping):
            return _as_json(part), ""
        kind = _kind(part)
        if kind in _THINKING:
            return "", _first_text(part, kind, "thinking", "text", "content")
        if kind in _TEXTS:
            return _well_formed(_first_text(part, kind, "text")), ""
        if kind == "tool_result":
            return self.content(part.get("content"), is_result=True)
        if any(medium in kind for medium in _MEDIA):
            return self._unreadable(kind, where), ""
        self.note(f"a content part of type {kind!r} was given to the model as JSON")
        return _as_json(part), ""

    def _unreadable(self, kind: str, where: str) -> str:
        """What stands for a picture or a sound of the past."""
        if self._i_message >= self._i_current:
            raise self._refused(where, f"it is {kind}; the model reads text only")
        self.note(f"{kind} in past messages was left out: the model reads text only")
        return f"[{kind} left out]"

    def _calls(self, raw: Mapping[str, Any]) -> tuple[ToolCall, ...]:
        calls = raw.get("tool_calls") or []
        old = raw.get("function_call")
        entries = [
            *(calls if isinstance(calls, list) else [calls]),
            *([{"function": old}] if old else []),
        ]
        return tuple(self._call(entry) for entry in entries if isinstance(entry, Mapping))

    def _call(self, entry: Mapping[str, Any]) -> ToolCall:
        function = entry.get("function") or entry.get("custom") or entry
        if not isinstance(function, Mapping):
            function = {"name": function}
        name = str(function.get("name") or "unknown")
        given = function.get("arguments", function.get("input"))
        return ToolCall(str(entry.get("id") or ""), name, self.arguments(given, name))

    def arguments(self, value: Any, name: str) -> dict[str, Any]:
        """The arguments of a past call; what is no object stays readable under one name."""
        if isinstance(value, Mapping):
            return dict(value)
        if value is None:
            return {}
        if not isinstance(value, str):
            self.note(f"the arguments of a past call of {name} are no object")
            return {"arguments": value}
        if not value.strip():
            return {}
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return self._cut_off(value, name)
        return parsed if isinstance(parsed, dict) else self.arguments(parsed, name)

    def _cut_off(self, text: str, name: str) -> dict[str, Any]:
        """What was written of an object before it broke off; else the text itself."""
        self.note(f"the arguments of a past call of {name} are no whole JSON")
        with suppress(ValueError, RecursionError):
            json.JSONDecoder().raw_decode(text.lstrip())
            return {"arguments": text}  # it is whole, and something follows
        with suppress(ValueError):
            parsed = from_json(_well_formed(text), allow_partial="trailing-strings")
            if isinstance(parsed, dict):
                return parsed
        return {"arguments": text}

    def note(self, text: str) -> None:
        """Tell the person something, once."""
        self._notes[text] = None

    def _refused(self, field: str, why: str) -> ApiError:
        return invalid(f"{self._field}[{self._i_message}].{field}", why)


def read_messages(raw: list[dict[str, Any]]) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The conversation, and what of it was taken otherwise than it was sent.

    Raises:
        ApiError: As `History.read`.
    """
    replies = [i for i, message in enumerate(raw) if message.get("role") == "assistant"]
    history = History(replies[-1] + 1 if replies else 0)
    messages = tuple(history.read(i, message) for i, message in enumerate(raw))
    return messages, history.notices


def to_continue(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], bool]:
    """The messages, and whether the last of them is a reply that was begun and goes on.

    One without a word is how some clients say who speaks next.
    """
    if not messages or messages[-1].role != "assistant" or messages[-1].tool_calls:
        return messages, False
    last = messages[-1]
    if len(messages) > 1 and not (last.content or last.thinking):
        return messages[:-1], False
    return messages, True


def _kind(part: Any) -> str:
    """What a content part is; one that only has a text is text."""
    if not isinstance(part, Mapping):
        return ""
    kind = part.get("type")
    if kind is None:
        return "text" if isinstance(part.get("text"), str) else ""
    return str(kind)


def _has_parts(values: list[Any]) -> bool:
    """Whether a tool's list is parts of text and not a list of values that it found."""
    return all(isinstance(value, str) or bool(_kind(value)) for value in values)


def _first_text(part: Mapping[str, Any], *names: str) -> str:
    for name in names:
        value = part.get(name)
        if isinstance(value, str):
            return value
        if value is not None:
            return _as_json(value)
    return ""


def _well_formed(text: str) -> str:
    """JSON can spell half of a character, for which there is no token."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
