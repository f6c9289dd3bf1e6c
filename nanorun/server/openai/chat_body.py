"""What /v1/chat/completions takes, and what it means to the engine.

Nothing that would change an answer is dropped in silence: `policy` says what becomes of fields
that are not here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    StrictBool,
    field_validator,
    model_validator,
)

from nanorun.model.chat import GenerateOptions, Grammar
from nanorun.model.sampling import MAX_LOGPROBS
from nanorun.model.think import OFF, Think
from nanorun.server.asked import Asked
from nanorun.server.depth import EFFORTS, read_depth
from nanorun.server.errors import ApiError, invalid
from nanorun.server.history import read_messages, to_continue
from nanorun.server.limits import LimitedBody
from nanorun.server.openai.formats import ResponseFormat, StructuredOutputs
from nanorun.server.policy import understand
from nanorun.server.sampling_body import SamplingBody, asked_numbers
from nanorun.server.tools import ToolChoice, ToolIn

_Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
TokenCount = Annotated[int, Field(ge=1, strict=True)]
MAX_CHOICES = 64


class StreamOptions(BaseModel):
    """What a stream carries beside the answer."""

    include_usage: bool = False


class TemplateOptions(BaseModel):
    """The template's own switch, as vLLM's clients set it."""

    model_config = ConfigDict(extra="forbid")

    enable_thinking: bool | None = None
    truncate_history_thinking: bool | None = None
    """False leaves the thinking of earlier turns in the prompt."""


class AnswerBody(LimitedBody, SamplingBody):
    """What chat and plain completions have in common."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES, strict=True)] | None = None
    max_tokens: TokenCount | None = None
    logit_bias: dict[Annotated[int, Field(ge=0)], _Bias] | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    """`flex` may wait: it gives way to all others while they need its place."""
    ignore_eos: StrictBool | None = None
    """llama.cpp's: go on past the end of the turn."""
    stop: list[Annotated[str, Field(min_length=1)]] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    """vLLM's: a form that JSON Schema cannot express."""

    @model_validator(mode="wrap")
    @classmethod
    def _understand(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        return handler(understand(value, cls._known()) if isinstance(value, dict) else value)

    @classmethod
    def _known(cls) -> frozenset[str]:
        return frozenset(cls.model_fields)

    @field_validator("stop", mode="before")
    @classmethod
    def _to_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """llama.cpp takes pairs, with false for a token that must not come."""
        if isinstance(value, list) and all(map(_is_bias_pair, value)):
            return {token: -100 if bias is False else bias for token, bias in value}
        return value

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def answer_options(self) -> dict[str, Any]:
        """The fields of `GenerateOptions` that both have."""
        return {
            **asked_numbers(self),
            "logit_bias": tuple((self.logit_bias or {}).items()),
            "priority": "background" if self.service_tier == "flex" else "interactive",
            "ignore_eos": bool(self.ignore_eos),
            "stop": tuple(self.stop or ()),
            "grammar": self._grammar(),
        }

    def _grammar(self) -> Grammar | None:
        """The form that the answer must have.

        Raises:
            ApiError: If two are asked for.
        """
        schema = self.response_format.schema_text() if self.response_format else None
        other = self.structured_outputs.to_grammar() if self.structured_outputs else None
        if schema is not None and other is not None:
            message = "response_format and structured_outputs both give a form; give one of them"
            raise ApiError(400, message, code="invalid_value", param="structured_outputs")
        return other if schema is None else Grammar("json_schema", schema)


class ChatRequest(AnswerBody):
    """The body of a chat completion; the numbers of sampling are `SamplingBody`'s."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: TokenCount | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[ToolIn] | None = None
    tool_choice: Any = None
    parallel_tool_calls: StrictBool | None = None
    reasoning_effort: str | None = None
    reasoning_budget: Annotated[int, Field(ge=-1, strict=True)] | None = None
    reasoning: Any = None
    """OpenRouter's and Anthropic's objects, a level, a budget, or whether to think."""
    include_reasoning: StrictBool | None = None
    """False keeps the thinking to the server."""
    chat_template_kwargs: TemplateOptions | None = None
    continue_final_message: StrictBool | None = None
    """vLLM's: whether a last message of the assistant goes on; if nobody says, it does."""
    add_generation_prompt: StrictBool | None = None
    """vLLM's: the opposite."""

    def to_asked(self, *, default_think: Think) -> Asked:
        """What it asks of the engine.

        Raises:
            ApiError: Naming the field that cannot be meant.
        """
        messages, notices = read_messages(self.messages)
        messages, is_begun = to_continue(messages)
        continues = self._continues(is_begun=is_begun)
        options = replace(self._options(default_think), continue_final=continues)
        return Asked(messages, options, self.n or 1, notices)

    def _continues(self, *, is_begun: bool) -> bool:
        """Whether the last message is to be gone on with."""
        says = self.continue_final_message
        says_not = self.add_generation_prompt
        if says is not None and says is says_not:
            raise invalid("add_generation_prompt", "it contradicts continue_final_message")
        wanted = says if says is not None else None if says_not is None else not says_not
        if wanted and not is_begun:
            field = "add_generation_prompt" if says is None else "continue_final_message"
            raise invalid(field, "the last message is no answer that was begun")
        return is_begun if wanted is None else wanted

    def _options(self, default_think: Think) -> GenerateOptions:
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "it needs logprobs to be true")
        choice = ToolChoice.read(self.tool_choice)
        tools = choice.offered([tool.to_tool() for tool in self.tools or ()])
        template = self.chat_template_kwargs
        return GenerateOptions(
            **self.answer_options(),
            think=self._think(default_think),
            max_tokens=self._limit(),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            keep_thinking=template is not None and template.truncate_history_thinking is False,
            echo_thinking=self._echoes_thinking,
            tools=tools,
            tool_choice=choice.must_call(tools),
            parallel_tool_calls=self.parallel_tool_calls is not False,
        )

    def _limit(self) -> int | None:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise invalid("max_tokens", "max_completion_tokens differs from it; give one of them")
        return both.pop() if both else None

    @property
    def hides_thinking(self) -> bool:
        """Whether the client wants the answer only."""
        excluded = isinstance(self.reasoning, dict) and self.reasoning.get("exclude") is True
        return self.include_reasoning is False or excluded

    @property
    def _echoes_thinking(self) -> bool | None:
        """Whether this client gives thinking back; None before it had a chance to."""
        replies = [message for message in self.messages if message.get("role") == "assistant"]
        thoughts = [m.get("reasoning_content") or m.get("reasoning") for m in replies]
        return any(thoughts) if replies else None

    def _think(self, default: Think) -> Think:
        """The depth: a budget says it most exactly, then the effort, then the template's switch."""
        asked = read_depth(self.reasoning_budget, "reasoning_budget")
        asked = asked or read_depth(self._effort(), "reasoning_effort")
        asked = asked or read_depth(self.reasoning, "reasoning")
        template = self.chat_template_kwargs
        switched_off = template is not None and template.enable_thinking is False
        return asked or (OFF if switched_off else default)

    def _effort(self) -> str | None:
        effort = self.reasoning_effort
        if effort is not None and effort not in EFFORTS:
            raise invalid("reasoning_effort", f"{effort!r} is none of {', '.join(EFFORTS)}")
        return effort


def _is_bias_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], int | str)


class ControlRequest(BaseModel):
    """The body that changes a reply while it streams."""

    id: str
    action: Literal["reasoning_end", "reasoning_budget"]
    reasoning_budget: Annotated[int, Field(ge=-1)] | None = None
    """For the action of that name: thinking tokens from the reply's start; -1 for no limit."""
