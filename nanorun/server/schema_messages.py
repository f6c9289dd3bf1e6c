"""The parts of a request's body: messages, tools, and what the template is told."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from nanorun.model.chat import Message, ToolCall


def flatten_content(content: Any) -> str:
    """The text of a message's content: a string, or an array of text parts.

    Raises:
        ValueError: If it is something else, an image for instance.
    """
    if isinstance(content, list):
        content = "".join(_part_text(part, f"part {i}") for i, part in enumerate(content))
    if not isinstance(content, str | None):
        raise ValueError("it must be a string or an array of text parts")
    text = content or ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a character; there is no token for it.
        raise ValueError(f"character {error.start} is half of a surrogate pair") from error
    return text


def _part_text(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "refusal"):
        raise ValueError(f"{where} is {kind or type(part).__name__}; the model reads text only")
    text = part.get(kind)
    if not isinstance(text, str):
        raise ValueError(f"{where} has no {kind}")
    return text


class FunctionCall(BaseModel):
    """The function of a tool call in the history."""

    name: str
    arguments: dict[str, Any]

    @field_validator("arguments", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        """OpenAI sends the arguments as JSON in a string."""
        if not isinstance(value, str):
            return value
        try:
            parsed = json.loads(value or "{}")
        except ValueError as error:
            raise ValueError(f"it is not JSON: {error}") from error
        if not isinstance(parsed, dict):
            raise ValueError("it must be a JSON object")
        return parsed


class ToolCallIn(BaseModel):
    """A tool call in the history."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class MessageIn(BaseModel):
    """One message of the conversation. What other servers add to their messages is ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, Field(validate_default=True)] = ""
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallIn] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    audio: Any = None

    @property
    def has_thinking(self) -> bool:
        """Whether the client gave a reply's thinking back."""
        return bool(self.reasoning_content or self.reasoning)

    @field_validator("content", mode="before")
    @classmethod
    def _flatten(cls, value: Any) -> str:
        return flatten_content(value)

    @field_validator("function_call", "audio")
    @classmethod
    def _refuse(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("it is not supported")

    @model_validator(mode="after")
    def _check_role(self) -> MessageIn:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls do not belong to role {self.role!r}")
        return self

    def to_message(self) -> Message:
        """The message as the engine takes it."""
        calls = [
            ToolCall(call.id, call.function.name, call.function.arguments)
            for call in self.tool_calls or ()
        ]
        return Message(
            "system" if self.role == "developer" else self.role,
            self.content,
            thinking=self.reasoning_content or self.reasoning or None,
            tool_calls=tuple(calls),
            tool_call_id=self.tool_call_id,
        )


class FunctionIn(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(pattern=r"^[^\s<>\"'{}]+$")]
    """Nemotron's form of a call has no escapes, so nothing in a name may look like markup."""
    description: str | None = None
    parameters: dict[str, Any] | None = None

    @field_validator("parameters")
    @classmethod
    def _check_shape(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        schema = value or {}
        if not isinstance(schema.get("properties"), dict | None):
            raise ValueError("its properties must be an object")
        required = schema.get("required") or []
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise ValueError("its required must be an array of names")
        return value


class ToolIn(BaseModel):
    """A tool that the model may use."""

    type: Literal["function"]
    function: FunctionIn

    def to_tool(self) -> dict[str, Any]:
        """The tool without its nulls: templates take an absent description, not a null one."""
        return {"type": self.type, "function": self.function.model_dump(exclude_none=True)}


class NamedFunction(BaseModel):
    """The name of a function."""

    name: str


class NamedTool(BaseModel):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class StreamOptions(BaseModel):
    """What a stream carries beside the answer."""

    include_usage: bool = False


class TemplateOptions(BaseModel):
    """The template's own switch, as vLLM's clients set it."""

    model_config = ConfigDict(extra="forbid")

    enable_thinking: bool | None = None
    truncate_history_thinking: bool | None = None
    """False leaves the thinking of earlier turns in the prompt."""
