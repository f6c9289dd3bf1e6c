"""A reply while it arrives: what its events have said, for whoever shows or sends it."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanorun.model.chat import (
    Event,
    Finished,
    Message,
    Notice,
    PrefillProgress,
    TextDelta,
    ThinkingDelta,
    TokenLogprobs,
    ToolArguments,
    ToolCall,
    ToolCallBegun,
    ToolCallDelta,
)


@dataclass(slots=True)
class BegunCall:
    """A call while it is written, and what was said of it."""

    id: str
    name: str
    arguments: str = ""
    """The JSON text of the arguments; an object that does not end if the call broke off."""
    is_complete: bool = False


@dataclass(slots=True)
class ReplySoFar:
    """What the events of one reply have said."""

    thinking: str = ""
    answer: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)
    """Every complete call in its order, those that could not be read with their problem."""
    begun: list[BegunCall] = field(default_factory=list)
    """Every call that was begun, by its index; the last one may still be written."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    prefill: PrefillProgress | None = None
    """How much of the prompt was evaluated when last told."""
    finished: Finished | None = None
    is_thinking: bool = False
    """Whether the last text was thinking and nothing has come after it."""

    def take(self, event: Event) -> None:
        """Add the next event."""
        match event:
            case ThinkingDelta(text):
                self.thinking += text
                self.is_thinking = True
            case TextDelta(text):
                self.answer += text
                self.is_thinking = False
            case ToolCallBegun(id=call_id, name=name):
                self.begun.append(BegunCall(call_id, name))
                self.is_thinking = False
            case ToolArguments(index, text):
                self.begun[index].arguments += text
            case ToolCallDelta(index, call):
                self.calls.append(event)
                self.is_thinking = False
                if call.name and index < len(self.begun):
                    self.begun[index].is_complete = True
            case TokenLogprobs():
                self.logprobs.append(event)
            case Notice(text):
                self.notices.append(text)
            case PrefillProgress():
                self.prefill = event
            case Finished():
                self.finished = event
                self.is_thinking = False

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls as they were read, also where that was not possible."""
        return [delta.call for delta in self.calls]

    def message(self) -> Message:
        """The reply as a message of the conversation."""
        return Message(
            role="assistant",
            content=self.answer,
            thinking=self.thinking or None,
            tool_calls=tuple(self.tool_calls),
        )
