"""Anthropic's conversations, made of content blocks, as nanorun's messages.

The same text becomes the same message in whatever form it comes: a string, or a list of blocks.
System texts before the first reply are joined in front, in their order: there they stay the same
from turn to turn and from session to session, and so does the prompt state that they cost. Later
ones stay where they are; moved to the front they would make the whole prompt new.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from nanorun.model.chat import Message, ToolCall
from nanorun.server.history import SYSTEM_JOINT, History

_BOOKKEEPING = "x-anthropic-billing-header:"
"""Begins a block that Claude Code writes for its vendor; it depends on the first question."""


def read_conversation(
    system: Any, raw: list[dict[str, Any]]
) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The conversation, and what of it was taken otherwise than it was sent.

    Args:
        system: The system prompt: a text, or blocks.
        raw: The messages.

    Raises:
        ApiError: If a role is unknown, or what is asked now cannot be read.
    """
    replies = [i for i, message in enumerate(raw) if message.get("role") == "assistant"]
    reader = _Reader(History(replies[-1] + 1 if replies else 0))
    first_reply = replies[0] if replies else len(raw)
    opening = [m.get("content") for m in raw[:first_reply] if m.get("role") in _SYSTEM]
    texts = [text for content in (system, *opening) for text in reader.system_texts(content)]
    messages = [Message("system", SYSTEM_JOINT.join(texts))] if texts else []
    for i, message in enumerate(raw):
        if i >= first_reply or message.get("role") not in _SYSTEM:
            messages += reader.read(i, message)
    return tuple(messages), reader.history.notices


_SYSTEM = ("system", "developer")


class _Reader:
    def __init__(self, history: History) -> None:
        self.history = history

    def system_texts(self, content: Any) -> list[str]:
        """The texts of a system prompt's blocks that are for the model."""
        made = []
        for block in content if isinstance(content, list) else [content]:
            text, _ = self.history.content(block)
            if text.startswith(_BOOKKEEPING):
                self.history.note("a block of bookkeeping for the vendor was left out")
            elif text:
                made.append(text)
        return made

    def read(self, i_message: int, raw: Mapping[str, Any]) -> Iterable[Message]:
        """The messages that one of Anthropic's is: the results of tools are each their own."""
        role, content = raw.get("role"), raw.get("content")
        blocks = content if isinstance(content, list) else [content]
        if role in _SYSTEM:
            # Joined as those in front are, or the next turn would have other tokens.
            text = SYSTEM_JOINT.join(self.system_texts(content))
            return [Message("system", text)] if text else []
        if role == "assistant":
            return [self._reply(i_message, blocks)]
        results = [self._result(i_message, b or {}) for b in blocks if _kind(b) == "tool_result"]
        rest = [block for block in blocks if _kind(block) != "tool_result"]
        if results and not rest:
            return results
        said = self.history.read(i_message, {"role": role, "content": rest})
        return [*results, said]

    def _reply(self, i_message: int, blocks: list[Any]) -> Message:
        calls = tuple(self._call(block) for block in blocks if _kind(block).endswith("tool_use"))
        rest = [b for b in blocks if not _kind(b).endswith("tool_use")]
        texts = [b for b in rest if _kind(b) != "redacted_thinking"]
        said = self.history.read(i_message, {"role": "assistant", "content": texts})
        content = "" if calls and not said.content.strip() else said.content
        return Message("assistant", content, said.thinking, calls)

    def _call(self, block: Mapping[str, Any]) -> ToolCall:
        name = str(block.get("name") or "unknown")
        return ToolCall(
            str(block.get("id") or ""), name, self.history.arguments(block.get("input"), name)
        )

    def _result(self, i_message: int, block: Mapping[str, Any]) -> Message:
        said = self.history.read(i_message, {"role": "tool", "content": block.get("content")})
        text = said.content
        if block.get("is_error"):
            text = json.dumps({"error": text}, ensure_ascii=False)
        called = block.get("tool_use_id")
        return Message("tool", text, tool_call_id=None if called is None else str(called))


def _kind(block: Any) -> str:
    return str(block.get("type") or "") if isinstance(block, Mapping) else ""
