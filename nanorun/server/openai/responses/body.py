"""What /v1/responses takes, and what it means to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    StrictBool,
    ValidationError,
    model_validator,
)

from nanorun.model.chat import GenerateOptions, Grammar
from nanorun.model.sampling import MAX_LOGPROBS
from nanorun.model.think import Think
from nanorun.server.asked import Asked
from nanorun.server.depth import read_depth
from nanorun.server.errors import invalid
from nanorun.server.limits import LimitedBody
from nanorun.server.openai.chat_body import TokenCount
from nanorun.server.openai.formats import ResponseFormat
from nanorun.server.openai.responses.items import kind_of, read_items
from nanorun.server.openai.responses.offered import OfferedTools
from nanorun.server.openai.responses.output_items import new_id
from nanorun.server.policy import understand
from nanorun.server.sampling_body import SamplingBody, asked_numbers
from nanorun.server.tools import ToolChoice

_SEALED_REASONING = "reasoning.encrypted_content"
_LOGPROBS = "message.output_text.logprobs"


class ResponsesRequest(LimitedBody, SamplingBody):
    """The body of a response; the numbers of sampling are `SamplingBody`'s."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    input: str | list[dict[str, Any]] = Field(default_factory=list)
    instructions: str | None = None
    previous_response_id: str | None = None
    store: StrictBool | None = None
    background: StrictBool | None = None
    stream: StrictBool | None = None
    stream_options: dict[str, Any] | None = None
    """`include_obfuscation`, which there is none of."""
    include: list[str] | None = None
    """Sealed reasoning and log-probabilities; there is nothing behind the other words."""
    max_output_tokens: TokenCount | None = None
    max_tool_calls: Any = None
    """Limits tools that a vendor runs; there are none."""
    parallel_tool_calls: StrictBool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    text: dict[str, Any] | None = None
    reasoning: Any = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    """What does not fit is refused either way: nothing of a conversation is left out in silence."""
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _understand(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        known = frozenset(cls.model_fields)
        return handler(understand(value, known) if isinstance(value, dict) else value)

    @property
    def is_stored(self) -> bool:
        """Whether the response is kept, as it is unless the client says no."""
        return self.store is not False

    @property
    def seals_reasoning(self) -> bool:
        """Whether the thinking is to come back as `encrypted_content`."""
        return _SEALED_REASONING in (self.include or ())

    @property
    def summarizes(self) -> bool:
        """Whether the client looks for thinking in summaries."""
        asked = self.reasoning if isinstance(self.reasoning, dict) else {}
        return any(asked.get(name) for name in ("summary", "generate_summary"))

    def own_items(self) -> list[dict[str, Any]]:
        """What is asked now, as items that have ids.

        Raises:
            ApiError: If nothing is.
        """
        asked = self.input
        if isinstance(asked, str):
            asked = [{"role": "user", "content": asked}] if asked else []
        if not asked and self.previous_response_id is None:
            raise invalid("input", "there is nothing to answer")
        return [_with_id(item) for item in asked]

    def to_asked(
        self, conversation: Sequence[dict[str, Any]], tools: OfferedTools, *, default_think: Think
    ) -> Asked:
        """What it asks of the engine.

        Args:
            conversation: All items, those of earlier responses in front.
            tools: What it offers.
            default_think: The depth where it names none.

        Raises:
            ApiError: Naming the field that cannot be meant.
        """
        messages, notices = read_items(self.instructions, conversation)
        choice = ToolChoice.read(self.tool_choice)
        functions = choice.offered(tools.functions)
        options = GenerateOptions(
            **asked_numbers(self),
            think=read_depth(self.reasoning, "reasoning") or default_think,
            max_tokens=self.max_output_tokens,
            logprobs=self._n_logprobs(),
            priority="background" if self.service_tier == "flex" else "interactive",
            tools=functions,
            tool_choice=choice.must_call(functions),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            grammar=self._grammar(),
            echo_thinking=self._echoes_thinking(conversation),
        )
        return Asked(messages, options, notices=(*notices, *tools.notices()))

    def _n_logprobs(self) -> int | None:
        wanted = self.top_logprobs is not None or _LOGPROBS in (self.include or ())
        return (self.top_logprobs or 0) if wanted else None

    def _grammar(self) -> Grammar | None:
        """The form of the answer, from `text.format`."""
        given = (self.text or {}).get("format")
        if given is None:
            return None
        try:
            schema = ResponseFormat.model_validate(given).schema_text("text.format")
        except ValidationError as error:
            raise invalid("text.format", error.errors()[0]["msg"]) from error
        return None if schema is None else Grammar("json_schema", schema)

    def _echoes_thinking(self, conversation: Sequence[dict[str, Any]]) -> bool | None:
        """Whether thinking comes back in the next turn; None before that can be known."""
        if self.is_stored:
            return True
        kinds = {kind_of(item) for item in conversation if item.get("role") != "user"}
        return "reasoning" in kinds if kinds & {"message", "function_call", "reasoning"} else None

    def echoed(self) -> dict[str, Any]:
        """The fields of the request that its response repeats."""
        choice, text = self.tool_choice, self.text or {}
        return {
            "background": bool(self.background),
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": _reasoning_object(self.reasoning),
            "safety_identifier": self.safety_identifier,
            "service_tier": self.service_tier or "default",
            "store": self.is_stored,
            "temperature": getattr(self, "temperature", None),
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": "auto" if choice is None else choice,
            "tools": self.tools or [],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": getattr(self, "top_p", None),
            "truncation": self.truncation or "disabled",
            "user": self.user,
        }


class ItemsQuery(BaseModel):
    """Which of a response's input items are wanted."""

    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    before: str | None = None
    include: list[str] | None = None


def _with_id(item: dict[str, Any]) -> dict[str, Any]:
    """An item with its kind written out and an id, by which it can be referred to."""
    kind = kind_of(item)
    prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}.get(kind, "item")
    given = item.get("id")
    made = {
        **item,
        "type": kind,
        "id": given if isinstance(given, str) and given else new_id(prefix),
    }
    content = item.get("content")
    if kind == "message" and isinstance(content, str) and item.get("role") != "assistant":
        made["content"] = [{"type": "input_text", "text": content}]
    return made


def _reasoning_object(value: Any) -> dict[str, Any]:
    asked = (
        value if isinstance(value, dict) else {"effort": value if isinstance(value, str) else None}
    )
    return {"effort": asked.get("effort"), "summary": asked.get("summary")}
