"""The events of one tool call: that it begins, pieces of its arguments, the call."""

from __future__ import annotations

from nanorun.chat.call_parsing import ParsedCall
from nanorun.model.chat import (
    Event,
    ToolArguments,
    ToolCall,
    ToolCallBegun,
    ToolCallDelta,
    arguments_text,
)


class CallEvents:
    """Tells of a call, so that the pieces of its arguments agree with the whole.

    Args:
        index: Its place among the calls that were begun.
        call_id: Its id.
        name: The tool.
    """

    def __init__(self, index: int, call_id: str, name: str) -> None:
        self.id = call_id
        self._index = index
        self._name = name
        self._said: list[str] = []

    def begun(self) -> ToolCallBegun:
        """The call begins."""
        return ToolCallBegun(self._index, self.id, self._name)

    def add(self, text: str) -> ToolArguments:
        """More of the arguments' JSON text."""
        self._said.append(text)
        return ToolArguments(self._index, text)

    def complete(self, parsed: ParsedCall) -> list[Event]:
        """What is missing of the arguments, and the call.

        The object of a call that broke off stays open; one was at least begun, since clients take
        no arguments at all for `{}`.
        """
        call = ToolCall(self.id, parsed.name, parsed.arguments)
        whole, said, problem = arguments_text(call), "".join(self._said), parsed.problem
        rest = "" if said else "{"
        if parsed.is_whole and whole.startswith(said):
            rest = whole[len(said) :]
        elif parsed.is_whole:
            differs = f"its arguments began differently: {said}"
            problem = f"{problem}; {differs}" if problem else differs
        events: list[Event] = [self.add(rest)] if rest else []
        return [*events, ToolCallDelta(self._index, call, problem)]


def unread(index: int, call_id: str, parsed: ParsedCall) -> ToolCallDelta:
    """A call that could not be read, which never began.

    Args:
        index: The calls begun before it.
        call_id: Its id.
        parsed: What is wrong with it.
    """
    return ToolCallDelta(index, ToolCall(call_id, "", {}), parsed.problem)
