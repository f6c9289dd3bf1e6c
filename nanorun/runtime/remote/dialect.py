"""How endpoints in OpenAI's style differ, and what a request to each of them says.

The common part is OpenAI's. Beside it, each family has words of its own for how long to think and
for giving a turn's thinking back; `/v1/models` tells the families apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from nanorun.chat.markup import END_THINK, THINK
from nanorun.errors import UsageError
from nanorun.model.chat import GenerateOptions, Message, Prompt, RawPrompt
from nanorun.model.sampling import NUMBERS
from nanorun.model.think import Think, grace_tokens


class Control(Enum):
    """How thinking that runs can be ended."""

    ROUTE = "route"
    """POST /v1/chat/completions/control, which can only end it."""
    BUDGET_ROUTE = "budget route"
    """The same, and it takes a new budget too."""
    CONTINUE = "continue"
    """Stop the reply, then ask again with the thinking, closed, as the beginning of the answer:
    what NVIDIA documents for a budget (two calls)."""
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a family of endpoints takes and says."""

    name: str
    control: Control = Control.NONE
    thinking_fields: tuple[str, ...] = ()
    """Fields of an assistant's message that carry its thinking back."""
    counts_thinking: bool = False
    """Whether it holds thinking to a budget by itself, and parses replies as nanorun does."""
    max_tokens_field: str = "max_tokens"
    unknown_sampling: frozenset[str] = frozenset()
    """Sampling values that it would read over, and answer differently than asked."""
    sampling_names: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What it calls sampling values that go by another name elsewhere."""


_LLAMA_CPPS = frozenset({"penalty_last_n", "dry_multiplier", "dry_base", "dry_allowed_length"})
_NOT_OPENAIS = _LLAMA_CPPS | {"repetition_penalty"}

NANORUN = Dialect("nanorun", Control.BUDGET_ROUTE, ("reasoning_content",), counts_thinking=True)
LLAMA_CPP = Dialect(
    "llama.cpp",
    Control.ROUTE,
    ("reasoning_content",),
    sampling_names={"repetition_penalty": "repeat_penalty", "penalty_last_n": "repeat_last_n"},
)
# Its newer versions say `reasoning`, its older ones `reasoning_content`; both ignore the other.
VLLM = Dialect(
    "vLLM",
    Control.CONTINUE,
    ("reasoning", "reasoning_content"),
    unknown_sampling=_LLAMA_CPPS,
)
OPENAI = Dialect("OpenAI", max_tokens_field="max_completion_tokens", unknown_sampling=_NOT_OPENAIS)
OTHER = Dialect("OpenAI-style", unknown_sampling=_NOT_OPENAIS)

_CONTINUED = {"add_generation_prompt": False, "continue_final_message": True}
_BY_OWNER = {"nanorun": NANORUN, "llamacpp": LLAMA_CPP, "vllm": VLLM, "sglang": VLLM}


def dialect_of(model: Mapping[str, Any], host: str) -> Dialect:
    """The dialect of an endpoint, by its host and one entry of its `/v1/models`."""
    if host == "api.openai.com":
        return OPENAI
    known = _BY_OWNER.get(str(model.get("owned_by", "")).lower())
    if known is not None:
        return known
    # NIM and others that are built on vLLM put a name of their own there.
    return VLLM if "max_model_len" in model else OTHER


def check_options(prompt: Prompt, options: GenerateOptions) -> int | None:
    """The budget of thinking tokens, if the request makes sense.

    Raises:
        UsageError: If not; the same cases as with the local engine.
    """
    if not isinstance(prompt, RawPrompt):
        _check_messages(prompt, options)
    if options.max_tokens is not None and options.max_tokens < 1:
        raise UsageError(f"max_tokens {options.max_tokens} is less than 1")
    return options.think.budget


def _check_messages(messages: Sequence[Message], options: GenerateOptions) -> None:
    if not messages:
        raise UsageError("there are no messages to answer")
    if options.continue_final and messages[-1].role != "assistant":
        raise UsageError(
            "only an assistant's message can be continued, and the last is of role "
            f"{messages[-1].role}"
        )


def request_body(
    dialect: Dialect,
    model: str,
    messages: Sequence[Message],
    options: GenerateOptions,
    *,
    thinking_field: str | None = None,
) -> dict[str, Any]:
    """The body of a chat completion that streams.

    Args:
        dialect: What the endpoint takes.
        model: The model's name there.
        messages: The conversation.
        options: How to answer. What is None is left to the endpoint.
        thinking_field: The field in which this endpoint was seen to send thinking, if it was.
    """
    gives_back = options.echo_thinking or options.keep_thinking or options.continue_final
    fields = dialect.thinking_fields or ((thinking_field,) if thinking_field else ())
    body: dict[str, Any] = {
        "model": model,
        "messages": [message_body(m, fields if gives_back else ()) for m in messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        dialect.max_tokens_field: options.max_tokens,
        **_sampling(dialect, options),
        "ignore_eos": options.ignore_eos or None,
        "tools": list(options.tools) or None,
        **_form(dialect, options),
        "stop": list(options.stop) if options.stop and _can_stop(dialect, options) else None,
        **_thinking_body(dialect, options),
        **(_continuing(dialect, messages[-1]) if options.continue_final else {}),
    }
    return {name: value for name, value in body.items() if value is not None}


def completion_body(
    dialect: Dialect, model: str, prompt: RawPrompt, options: GenerateOptions
) -> dict[str, Any]:
    """The body of an old completion that streams.

    Args:
        dialect: What the endpoint takes.
        model: The model's name there.
        prompt: The prompt.
        options: How to go on from it. What is None is left to the endpoint.

    Raises:
        UsageError: If the endpoint has no words for what is asked.
    """
    asked = {
        "special False": not prompt.special,
        f"add_bos {prompt.add_bos}": prompt.add_bos is not None,
        "tools": bool(options.tools),
        "logprobs": options.logprobs is not None,
        "continue_final": options.continue_final,
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise UsageError(f"{what} cannot be asked of an endpoint with a raw prompt")
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt.text if prompt.tokens is None else list(prompt.tokens),
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": options.max_tokens,
        **_sampling(dialect, options),
        **_form(dialect, options),
        "ignore_eos": options.ignore_eos or None,
        "stop": list(options.stop) or None,
    }
    return {name: value for name, value in body.items() if value is not None}


def _sampling(dialect: Dialect, options: GenerateOptions) -> dict[str, Any]:
    """What is asked of the choice of tokens.

    Raises:
        UsageError: If the endpoint would read over a value, and answer differently than asked.
    """
    body: dict[str, Any] = {}
    for name in NUMBERS:
        value = getattr(options, name)
        if value is not None and name in dialect.unknown_sampling:
            raise UsageError(f"{name} {value} cannot be asked of an endpoint of {dialect.name}")
        body[dialect.sampling_names.get(name, name)] = value
    if options.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": options.logprobs}
    body["logit_bias"] = {str(token): bias for token, bias in options.logit_bias} or None
    return body


def _form(dialect: Dialect, options: GenerateOptions) -> dict[str, Any]:
    """What the reply must look like.

    Raises:
        UsageError: If the endpoint has no words for it.
    """
    body: dict[str, Any] = {}
    if options.tools and options.tool_choice != "auto":
        body["tool_choice"] = options.tool_choice
    if options.tools and not options.parallel_tool_calls:
        body["parallel_tool_calls"] = False
    grammar = options.grammar
    if grammar is None:
        return body
    if grammar.kind == "json_schema":
        schema = {"name": "answer", "schema": _schema(grammar.text), "strict": True}
        return {**body, "response_format": {"type": "json_schema", "json_schema": schema}}
    if dialect not in (NANORUN, VLLM):
        raise UsageError(
            f"a grammar of kind {grammar.kind} cannot be asked of an endpoint of {dialect.name}",
            facts=["a JSON schema can"],
        )
    key = "regex" if grammar.kind == "regex" else "grammar"
    return {**body, "structured_outputs": {key: grammar.text}}


def _schema(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"the grammar is no JSON schema: {error}") from error


def _can_stop(dialect: Dialect, options: GenerateOptions) -> bool:
    """Whether the endpoint looks for stop strings where it should.

    Most would end a reply by a stop string in its thinking, too; there they are looked for here.
    """
    return dialect.counts_thinking or options.think.is_off


def _thinking_body(dialect: Dialect, options: GenerateOptions) -> dict[str, Any]:
    """How long to think, in the endpoint's words."""
    budget = options.think.budget
    template: dict[str, Any] = {}
    if dialect in (LLAMA_CPP, VLLM):
        template["enable_thinking"] = budget != 0
    if options.keep_thinking and dialect in (NANORUN, LLAMA_CPP, VLLM):
        template["truncate_history_thinking"] = False
    body: dict[str, Any] = {"chat_template_kwargs": template or None}
    if dialect is NANORUN:
        if options.priority == "background":
            body["service_tier"] = "flex"
        level = options.think.level
        if level is None:
            return {**body, "reasoning_budget": budget}
        return {**body, "reasoning_effort": "none" if level == "off" else level}
    if dialect is LLAMA_CPP:
        body["return_progress"] = True
        if budget != 0:
            body |= {"reasoning_control": True, "reasoning_budget_tokens": hard_cap(options)}
        return body
    if dialect is VLLM:
        return body
    return {**body, "reasoning_effort": effort_of(options.think)}


def hard_cap(options: GenerateOptions) -> int | None:
    """Thinking tokens after which an endpoint that counts them shall cut; None for no limit.

    Thinking ends at the end of a line or sentence after the budget, so this lies the grace behind.
    """
    budget = options.think.budget
    half = None if options.max_tokens is None else options.max_tokens // 2
    limits = [n for n in (None if budget is None else budget + grace_tokens(budget), half) if n]
    return min(limits, default=None)


def effort_of(think: Think) -> str:
    """The nearest of OpenAI's efforts that every endpoint with efforts knows."""
    budget = think.budget
    if budget is None:
        return "high"
    steps = ((0, "none"), (512, "low"), (4096, "medium"))
    return next((effort for n_tokens, effort in steps if budget <= n_tokens), "high")


def message_body(message: Message, thinking_fields: Sequence[str] = ()) -> dict[str, Any]:
    """One message in OpenAI's form.

    Args:
        message: The message.
        thinking_fields: Fields that its thinking goes into; none to leave it out.
    """
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        body |= dict.fromkeys(thinking_fields, message.thinking)
    if message.tool_calls:
        body["content"] = message.content or None
        body["tool_calls"] = [
            {
                "id": call.id or f"call_{i}",
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False),
                },
            }
            for i, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id is not None:
        body["tool_call_id"] = message.tool_call_id
    return body


def _continuing(dialect: Dialect, last: Message) -> dict[str, Any]:
    """The words for going on with the last message.

    Raises:
        UsageError: If the endpoint has none, and would answer the message instead.
    """
    if dialect in (OPENAI, OTHER):
        raise UsageError(
            f"an endpoint of {dialect.name} cannot be asked to continue the last message"
        )
    if not last.content and dialect is not NANORUN:
        raise UsageError(f"an endpoint of {dialect.name} cannot be asked to continue thinking")
    return _CONTINUED


def continued_body(body: Mapping[str, Any], thinking: str, n_used: int) -> dict[str, Any]:
    """The second of two calls: the same request, its answer begun with thinking that is closed.

    Args:
        body: The first call's.
        thinking: What the first call thought.
        n_used: Tokens that this took from the reply's limit.
    """
    begun = {"role": "assistant", "content": f"{THINK}\n{thinking.rstrip()}\n{END_THINK}\n\n"}
    continued = {
        **body,
        "messages": [*body["messages"], begun],
        **_CONTINUED,
    }
    if "max_tokens" in body:
        continued["max_tokens"] = max(1, body["max_tokens"] - n_used)
    return continued
