"""What /v1/chat/completions takes, and what it means to the engine.

Nothing that would change an answer is dropped in silence: a field that is not supported is
refused by name, unless its value asks for what happens anyway. Fields that only label a request
are ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator, model_validator

from nanorun.model.chat import GenerateOptions, Message, ToolCall
from nanorun.server.errors import ApiError

EFFORTS: dict[str, str | int] = {
    "none": "off",
    "minimal": 128,
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": 32768,
    "max": "max",
}
"""OpenAI's `reasoning_effort` as reasoning depth; two of its steps are none of the dial's."""

_LABELS = frozenset({
    "metadata", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "user",
})  # fmt: skip
"""Fields that say nothing about the answer."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
}
"""Fields not supported, with the values that ask for nothing."""

_Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
_Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


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

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolIn(BaseModel):
    """A tool that the model may use."""

    type: Literal["function"]
    function: FunctionIn

    def to_tool(self) -> dict[str, Any]:
        """The tool without its nulls: templates take an absent description, not a null one."""
        return {"type": self.type, "function": self.function.model_dump(exclude_none=True)}


class StreamOptions(BaseModel):
    """What a stream carries beside the answer."""

    include_usage: bool = False


class TemplateOptions(BaseModel):
    """The template's own switch, as vLLM's clients set it."""

    model_config = ConfigDict(extra="forbid")

    enable_thinking: bool | None = None


class ChatRequest(BaseModel):
    """The body of a chat completion."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: Annotated[list[MessageIn], Field(min_length=1)]
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)] | None = None
    top_p: _Unit | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: _Unit | None = None
    seed: int | None = None
    logit_bias: dict[Annotated[int, Field(ge=0)], _Bias] | None = None
    ignore_eos: StrictBool | None = None
    """llama.cpp's: go on past the end of the turn."""
    stop: list[Annotated[str, Field(min_length=1)]] | None = None
    tools: list[ToolIn] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    reasoning_budget: Annotated[int, Field(ge=-1)] | None = None
    chat_template_kwargs: TemplateOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _to_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _check_choice(cls, value: Any) -> Any:
        if value not in (None, "none", "auto"):
            raise ValueError("only 'none' and 'auto' are supported")
        return value

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check_supported(self) -> None:
        """Refuse what would be answered differently than it was asked.

        Raises:
            ApiError: Naming the field.
        """
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _LABELS or value in _NEUTRAL.get(name, ()):
                continue
            neutral = _NEUTRAL.get(name)
            hint = f"; only {json.dumps(neutral[0])} is" if neutral else ""
            message = f"{name} {json.dumps(value)[:80]} is not supported{hint}"
            raise ApiError(400, message, code="unsupported_parameter", param=name)
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            message = "max_tokens and max_completion_tokens differ; give one of them"
            raise ApiError(400, message, code="invalid_value", param="max_tokens")

    def to_messages(self) -> list[Message]:
        """The conversation as the engine takes it."""
        return [message.to_message() for message in self.messages]

    def to_options(self, *, default_think: str | int) -> GenerateOptions:
        """The settings as the engine takes them."""
        offered = () if self.tool_choice == "none" else self.tools or ()
        return GenerateOptions(
            think=self._think(default_think),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            logit_bias=tuple((self.logit_bias or {}).items()),
            ignore_eos=bool(self.ignore_eos),
            echo_thinking=any(message.has_thinking for message in self.messages),
            stop=tuple(self.stop or ()),
            tools=tuple(tool.to_tool() for tool in offered),
        )

    def _think(self, default: str | int) -> str | int:
        """The depth: a budget says it most exactly, then the effort, then the template's switch."""
        if self.reasoning_budget is not None:
            return "max" if self.reasoning_budget < 0 else self.reasoning_budget
        if self.reasoning_effort is not None:
            return EFFORTS[self.reasoning_effort]
        if self.chat_template_kwargs and self.chat_template_kwargs.enable_thinking is False:
            return "off"
        return default
