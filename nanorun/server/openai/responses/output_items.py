"""A reply as the items of /v1/responses while it is written, and the events that tell of them.

Each item is told as OpenAI does: added empty, its one part added, deltas, and then everything whole
three times over (text, part, item), since some clients read only the first and some only the last.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from nanorun.model.chat import (
    Event,
    Finished,
    TextDelta,
    ThinkingDelta,
    TokenLogprobs,
    ToolArguments,
    ToolCallBegun,
    ToolCallDelta,
    arguments_text,
)
from nanorun.server.openai.likelihoods import token_object
from nanorun.server.openai.responses.items import CUSTOM_ARGUMENT, seal
from nanorun.server.openai.responses.offered import OfferedTools

Told = Iterator[tuple[str, dict[str, Any]]]
"""Events without the part of their name that is common to all, and their own fields."""


class OpenItem(ABC):
    """An item while it is written.

    Args:
        item: As it is before anything is said.
    """

    def __init__(self, item: dict[str, Any]) -> None:
        self.item = {**item, "status": "in_progress"}
        self.text = ""

    @property
    def where(self) -> dict[str, Any]:
        """What names this item in events."""
        return {"item_id": self.item["id"]}

    def begin(self) -> Told:
        """Tell that it begins."""
        yield "output_item.added", {"item": dict(self.item)}

    @abstractmethod
    def add(self, text: str) -> Told:
        """Add text to it."""

    def end(self) -> Told:
        """Tell that it is whole."""
        self.item["status"] = "completed"
        yield "output_item.done", {"item": dict(self.item)}


class ReasoningItem(OpenItem):
    """Thinking.

    Args:
        summarizes: Whether the client looks for it in the summary. It stands in one place only, or
            clients would show it twice.
        seals: Whether it is also given as `encrypted_content`.
    """

    def __init__(self, *, summarizes: bool, seals: bool) -> None:
        super().__init__({"type": "reasoning", "id": new_id("rs"), "summary": [], "content": []})
        self._seals = seals
        self._field = "summary" if summarizes else "content"
        self._part = "reasoning_summary_part" if summarizes else "content_part"
        self._name = "reasoning_summary_text" if summarizes else "reasoning_text"
        self._type = "summary_text" if summarizes else "reasoning_text"

    @property
    def where(self) -> dict[str, Any]:
        """The item and its part."""
        return {**super().where, f"{self._field}_index": 0}

    def begin(self) -> Told:
        """Tell that it begins."""
        yield from super().begin()
        yield f"{self._part}.added", {**self.where, "part": {"type": self._type, "text": ""}}

    def add(self, text: str) -> Told:
        """Add text to it."""
        self.text += text
        yield f"{self._name}.delta", {**self.where, "delta": text}

    def end(self) -> Told:
        """Tell that it is whole."""
        part = {"type": self._type, "text": self.text}
        self.item[self._field] = [part]
        if self._seals:
            self.item["encrypted_content"] = seal(self.text)
        yield f"{self._name}.done", {**self.where, "text": self.text}
        yield f"{self._part}.done", {**self.where, "part": part}
        yield from super().end()


class MessageItem(OpenItem):
    """Text of the answer."""

    def __init__(self) -> None:
        super().__init__({"type": "message", "id": new_id("msg"), "role": "assistant"})
        self.item["content"] = []
        self.fresh_logprobs: list[TokenLogprobs] = []
        """Of tokens whose text was not told yet."""
        self._logprobs: list[dict[str, Any]] = []

    @property
    def where(self) -> dict[str, Any]:
        """The item and its part."""
        return {**super().where, "content_index": 0}

    def begin(self) -> Told:
        """Tell that it begins."""
        yield from super().begin()
        yield "content_part.added", {**self.where, "part": _text_part("", [])}

    def add(self, text: str) -> Told:
        """Add text to it."""
        self.text += text
        logprobs = [token_object(token) for token in self.fresh_logprobs]
        self._logprobs += logprobs
        self.fresh_logprobs.clear()
        yield "output_text.delta", {**self.where, "delta": text, "logprobs": logprobs}

    def end(self) -> Told:
        """Tell that it is whole."""
        part = _text_part(self.text, self._logprobs)
        self.item["content"] = [part]
        done = {"text": self.text, "logprobs": self._logprobs}
        yield "output_text.done", {**self.where, **done}
        yield "content_part.done", {**self.where, "part": part}
        yield from super().end()


class CallItem(OpenItem):
    """A call of a function.

    Args:
        call_id: What its result will name.
        identity: The tool's name, and its namespace if it has one.
    """

    def __init__(self, call_id: str, identity: dict[str, str]) -> None:
        super().__init__(
            {"type": "function_call", "id": new_id("fc"), "call_id": call_id, **identity}
        )
        self.item["arguments"] = ""

    def add(self, text: str) -> Told:
        """Add text of the arguments."""
        self.text += text
        yield "function_call_arguments.delta", {**self.where, "delta": text}

    def complete(self, arguments: dict[str, Any], whole: str) -> Told:
        """Tell what of the arguments was not told yet, and that they are whole."""
        if whole.startswith(self.text) and whole != self.text:
            yield from self.add(whole[len(self.text) :])
        self.item["arguments"] = whole
        done = {"name": self.item["name"], "arguments": whole}
        yield "function_call_arguments.done", {**self.where, **done}
        yield from self.end()


class CustomCallItem(CallItem):
    """A call of a tool that takes free text: its JSON is only between the model and nanorun."""

    def __init__(self, call_id: str, identity: dict[str, str]) -> None:
        super().__init__(call_id, identity)
        self.item |= {"type": "custom_tool_call", "id": new_id("ctc"), "input": ""}
        del self.item["arguments"]

    def add(self, text: str) -> Told:
        """Wait for the whole."""
        self.text += text
        return iter(())

    def complete(self, arguments: dict[str, Any], whole: str) -> Told:
        """Tell the text."""
        text = str(arguments.get(CUSTOM_ARGUMENT, ""))
        self.item["input"] = text
        yield "custom_tool_call_input.delta", {**self.where, "delta": text}
        yield "custom_tool_call_input.done", {**self.where, "input": text}
        yield from self.end()


class OutputItems:
    """The items of one reply.

    Args:
        tools: What the model may call.
        summarizes: See `ReasoningItem`.
        seals: See `ReasoningItem`.
    """

    def __init__(
        self, tools: OfferedTools, *, summarizes: bool = False, seals: bool = False
    ) -> None:
        self.whole: list[dict[str, Any]] = []
        """Those that are complete."""
        self.broken_call: str | None = None
        """The name of a call that broke off; it is none of the items."""
        self._tools = tools
        self._summarizes = summarizes
        self._seals = seals
        self._open: OpenItem | None = None
        self._n_begun = 0
        self._fresh_logprobs: list[TokenLogprobs] = []

    def take(self, event: Event) -> Told:
        """Add an event of the reply and tell what it changes."""
        index = self._n_begun - 1
        for name, fields in self._take(event):
            index = self._n_begun - 1
            yield f"response.{name}", {"output_index": index, **fields}

    def _take(self, event: Event) -> Told:
        match event:
            case ThinkingDelta(text):
                yield from self._say(ReasoningItem, text)
            case TokenLogprobs(in_thinking=False):
                self._fresh_logprobs.append(event)
            case TextDelta(text):
                yield from self._say(MessageItem, text)
            case ToolCallBegun(id=call_id, name=name):
                yield from self._begin_call(call_id, name)
            case ToolArguments(text=text) if self._open is not None:
                yield from self._open.add(text)
            case ToolCallDelta(call=call):
                if not isinstance(self._open, CallItem):
                    yield from self._begin_call(call.id, call.name)
                assert isinstance(self._open, CallItem)
                yield from self._open.complete(call.arguments, arguments_text(call))
                self._put_away()
            case Finished(refusal=refusal):
                yield from self._finish(refusal)

    def _say(self, kind: type[ReasoningItem | MessageItem], text: str) -> Told:
        if not isinstance(self._open, kind):
            yield from self._begin(self._made(kind))
        assert self._open is not None
        if isinstance(self._open, MessageItem):
            self._open.fresh_logprobs += self._fresh_logprobs
            self._fresh_logprobs.clear()
        yield from self._open.add(text)

    def _made(self, kind: type[ReasoningItem | MessageItem]) -> OpenItem:
        if kind is ReasoningItem:
            return ReasoningItem(summarizes=self._summarizes, seals=self._seals)
        return MessageItem()

    def _begin_call(self, call_id: str, name: str) -> Told:
        kind = CustomCallItem if name in self._tools.custom else CallItem
        yield from self._begin(kind(call_id, self._tools.identity(name)))

    def _begin(self, item: OpenItem) -> Told:
        yield from self._end_open()
        self._open = item
        self._n_begun += 1
        yield from item.begin()

    def _end_open(self) -> Told:
        if self._open is not None:
            yield from self._open.end()
            self._put_away()

    def _put_away(self) -> None:
        assert self._open is not None
        self.whole.append(self._open.item)
        self._open = None

    def _finish(self, refusal: str | None) -> Told:
        if isinstance(self._open, CallItem):
            # Never told as done: clients would make half a call.
            self.broken_call = self._open.item["name"]
            self._open = None
        if refusal is None:
            yield from self._end_open()
            return
        if not isinstance(self._open, MessageItem):
            yield from self._begin(MessageItem())
        yield from self._refuse(refusal)

    def _refuse(self, refusal: str) -> Told:
        """A second part of the message, after the text that the check refuses."""
        assert self._open is not None
        where = {**self._open.where, "content_index": 1}
        part = {"type": "refusal", "refusal": refusal}
        yield "content_part.added", {**where, "part": {**part, "refusal": ""}}
        yield "refusal.delta", {**where, "delta": refusal}
        yield "refusal.done", {**where, "refusal": refusal}
        yield "content_part.done", {**where, "part": part}
        for name, fields in self._open.end():
            if name == "output_item.done":
                self._open.item["content"].append(part)
                fields = {"item": dict(self._open.item)}
            yield name, fields
        self._put_away()


def new_id(prefix: str) -> str:
    """An id that nobody guesses."""
    return f"{prefix}_{secrets.token_hex(16)}"


def _text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
