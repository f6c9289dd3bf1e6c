"""What /v1/chat/completions takes, and what it means to the engine.

Nothing that would change an answer is dropped in silence: a field that is not supported is
refused by name, unless its value asks for what happens anyway. Fields that only label a request
are ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator

from nanorun.model.chat import GenerateOptions, Grammar, Message
from nanorun.model.sampling import MAX_LOGPROBS
from nanorun.model.think import HIGH, LOW, MAX, MEDIUM, OFF, Think
from nanorun.server.errors import ApiError
from nanorun.server.schema_formats import ResponseFormat, StructuredOutputs
from nanorun.server.schema_messages import (
    MessageIn,
    NamedTool,
    StreamOptions,
    TemplateOptions,
    ToolIn,
)
from nanorun.server.schema_sampling import SamplingBody, asked_numbers

EFFORTS = {
    "none": OFF,
    "minimal": Think(128),
    "low": LOW,
    "medium": MEDIUM,
    "high": HIGH,
    "xhigh": Think(32768),
    "max": MAX,
}
"""OpenAI's `reasoning_effort` as reasoning depth; two of its steps are none of the dial's."""

_LABELS = frozenset({
    "metadata", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "store", "user",
})  # fmt: skip
"""Fields that say nothing about the answer."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "modalities": (["text"],),
    "n": (1,),
    "verbosity": ("medium",),
}
"""Fields not supported, with the values that ask for nothing."""

_Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class ChatRequest(SamplingBody):
    """The body of a chat completion; the numbers of sampling are `SamplingBody`'s."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: Annotated[list[MessageIn], Field(min_length=1)]
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logit_bias: dict[Annotated[int, Field(ge=0)], _Bias] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    """`flex` may wait: it gives way to all others while they need its place."""
    ignore_eos: StrictBool | None = None
    """llama.cpp's: go on past the end of the turn."""
    stop: list[Annotated[str, Field(min_length=1)]] | None = None
    tools: list[ToolIn] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    """vLLM's: a form that JSON Schema cannot express."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    reasoning_budget: Annotated[int, Field(ge=-1)] | None = None
    chat_template_kwargs: TemplateOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _to_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

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
        if self.top_logprobs and not self.logprobs:
            message = "top_logprobs needs logprobs to be true"
            raise ApiError(400, message, code="invalid_value", param="top_logprobs")
        if isinstance(self.tool_choice, NamedTool):
            self._named(self.tool_choice)

    def _named(self, choice: NamedTool) -> list[ToolIn]:
        """The one tool that must be called."""
        found = [t for t in self.tools or () if t.function.name == choice.function.name]
        if not found:
            message = f"tool_choice names {choice.function.name!r}, which is none of the tools"
            raise ApiError(400, message, code="invalid_value", param="tool_choice")
        return found[:1]

    def to_messages(self) -> list[Message]:
        """The conversation as the engine takes it."""
        return [message.to_message() for message in self.messages]

    def to_options(self, *, default_think: Think) -> GenerateOptions:
        """The settings as the engine takes them."""
        must_call = self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)
        return GenerateOptions(
            **asked_numbers(self),
            think=self._think(default_think),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logit_bias=tuple((self.logit_bias or {}).items()),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            priority="background" if self.service_tier == "flex" else "interactive",
            ignore_eos=bool(self.ignore_eos),
            keep_thinking=self._keeps_thinking,
            echo_thinking=self._echoes_thinking,
            stop=tuple(self.stop or ()),
            tools=tuple(tool.to_tool() for tool in self._offered()),
            tool_choice="required" if must_call else "auto",
            parallel_tool_calls=self.parallel_tool_calls is not False,
            grammar=self._grammar(),
        )

    def _offered(self) -> list[ToolIn]:
        if isinstance(self.tool_choice, NamedTool):
            return self._named(self.tool_choice)
        return [] if self.tool_choice == "none" else self.tools or []

    def _grammar(self) -> Grammar | None:
        """The form that the answer must have."""
        if self.response_format is not None:
            schema = self.response_format.schema_text()
            if schema is not None:
                return Grammar("json_schema", schema)
        return self.structured_outputs.to_grammar() if self.structured_outputs else None

    @property
    def _echoes_thinking(self) -> bool | None:
        """Whether this client gives thinking back; None before it had a chance to."""
        replies = [message for message in self.messages if message.role == "assistant"]
        return any(reply.has_thinking for reply in replies) if replies else None

    @property
    def _keeps_thinking(self) -> bool:
        template = self.chat_template_kwargs
        return template is not None and template.truncate_history_thinking is False

    def _think(self, default: Think) -> Think:
        """The depth: a budget says it most exactly, then the effort, then the template's switch."""
        if self.reasoning_budget is not None:
            return MAX if self.reasoning_budget < 0 else Think(self.reasoning_budget)
        if self.reasoning_effort is not None:
            return EFFORTS[self.reasoning_effort]
        if self.chat_template_kwargs and self.chat_template_kwargs.enable_thinking is False:
            return OFF
        return default


class ControlRequest(BaseModel):
    """The body that changes a reply while it streams."""

    id: str
    action: Literal["reasoning_end", "reasoning_budget"]
    reasoning_budget: Annotated[int, Field(ge=-1)] | None = None
    """For the action of that name: thinking tokens from the reply's start; -1 for no limit."""
