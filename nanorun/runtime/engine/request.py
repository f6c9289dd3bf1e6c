"""From messages and options to what the engine runs: tokens, stops, sampler, dial, parser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanorun.chat.call_grammar import call_grammar, reply_grammar
from nanorun.chat.markup import END_THINK, THINK
from nanorun.chat.parser import ReplyParser
from nanorun.chat.prompt import RenderedPrompt
from nanorun.errors import ModelError, UsageError
from nanorun.model.chat import GenerateOptions, Message
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.reply.constraint import Constraint
from nanorun.runtime.reply.dial import ReasoningDial, template_effort
from nanorun.runtime.sampling.settings import SamplingSettings, settle_sampling


@dataclass(slots=True)
class Request:
    """One reply to be made."""

    id: str
    prompt: list[int]
    boundaries: tuple[int, ...]
    """Token positions where another prompt may diverge: end of the system part, start of turns."""
    sampling: SamplingSettings
    dial: ReasoningDial
    parser: ReplyParser
    max_tokens: int | None
    ignore_eos: bool
    thinks: bool = False
    """Whether the reply begins with thinking."""
    constraint: Constraint | None = None
    """What the answer must look like."""
    background: bool = False
    """Give way to requests that somebody waits for."""
    anchor: bool = False
    """Only read the prompt, in idle time, for the sake of the next turn."""


def needs_constraint(options: GenerateOptions) -> bool:
    """Whether `compile_constraint` has anything to do."""
    one_call = bool(options.tools) and not options.parallel_tool_calls
    strict = any(tool["function"].get("strict") for tool in options.tools)
    return options.grammar is not None or options.tool_choice == "required" or one_call or strict


def compile_constraint(model: LoadedModel, options: GenerateOptions) -> Constraint | None:
    """The form that an answer is to have, if any; may take a second, in any thread.

    Raises:
        UsageError: If a grammar has no meaning, or a call is required and there are no tools.
    """
    must_call = options.tool_choice == "required"
    if must_call and not options.tools:
        raise UsageError("a tool call is required, but there are no tools")
    if not needs_constraint(options):
        return None
    call_tokens = model.call_tokens
    if options.grammar is None and not must_call:
        call = model.grammars.compile(call_grammar(options.tools, call_tokens=call_tokens))
        only_one = not options.parallel_tool_calls
        return Constraint(call=call, call_token=call_tokens[0], ends_with_call=only_one)
    reply = model.grammars.compile(
        reply_grammar(
            options.grammar, options.tools, parallel=options.parallel_tool_calls,
            call_tokens=call_tokens,
        )
    )  # fmt: skip
    return Constraint(reply=reply, call_token=call_tokens[0])


def prepare_request(
    request_id: str,
    model: LoadedModel,
    messages: Sequence[Message],
    options: GenerateOptions,
    constraint: Constraint | None = None,
    *,
    n_ctx: int,
) -> Request:
    """Render, tokenize and settle a request.

    Args:
        request_id: Its name.
        model: The model.
        messages: The conversation.
        options: How to answer.
        constraint: What `compile_constraint` made of the options.
        n_ctx: Tokens that the context holds, prompt and reply.

    Raises:
        UsageError: If the options or messages make no sense.
        ModelError: If the model's template makes nothing of the messages.
    """
    if not messages:
        raise UsageError("there are no messages to answer")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise UsageError(f"max_tokens {options.max_tokens} is less than 1")
    thinking = not options.think.is_off
    rendered = _render(model, messages, options, thinking)
    prompt, boundaries = tokenize_prompt(model, rendered)
    if not prompt:  # nothing to read is nothing to go on from: the engine would wait for it
        raise ModelError(
            f"the chat template of {model.path.name} makes no prompt of these messages"
        )
    thinking = thinking and rendered.text.rstrip("\n").endswith(THINK)
    if constraint is not None and not thinking:
        constraint.answer_begins()
    n_left = max(n_ctx - len(prompt), 0)
    max_reply = min(options.max_tokens or n_left, n_left)
    if options.grammar is not None and not options.tools:
        # A call would end the thinking and could not be part of the answer.
        no_call = (model.call_tokens[0], -math.inf)
        options = replace(options, logit_bias=(*options.logit_bias, no_call))
    return Request(
        id=request_id,
        prompt=prompt,
        boundaries=boundaries,
        sampling=settle_sampling(
            options, thinking=thinking, n_vocab=model.n_vocab, defaults=model.sampling_defaults
        ),
        dial=build_dial(model, options.think.budget, thinking=thinking, max_reply=max_reply),
        parser=ReplyParser(starts_in_thinking=thinking, tools=options.tools, stop=options.stop),
        max_tokens=options.max_tokens,
        ignore_eos=options.ignore_eos,
        thinks=thinking,
        constraint=constraint,
        background=options.priority == "background",
    )


def prepare_anchor(
    request_id: str,
    model: LoadedModel,
    messages: Sequence[Message],
    reply: Message,
    options: GenerateOptions,
) -> Request | None:
    """What the next turn will begin with, known as soon as a reply is complete.

    The template drops a turn's thinking once another user message follows, so the sequence that
    produced the reply does not fit the next prompt. Reading that prompt's known part ahead makes
    the next question cost its own tokens only. The template may render the reply differently with
    its thinking, so it is to be given as the next turn will have it.
    """
    thinking = not options.think.is_off
    following = [*messages, reply, Message("user", "?")]
    rendered = _render(model, following, options, thinking)
    prompt, boundaries = tokenize_prompt(model, rendered)
    i_next = len(messages) + 1
    ends = [
        position
        for position, boundary in zip(boundaries, rendered.boundaries, strict=True)
        if boundary.i_message == i_next and boundary.kind == "user"
    ]
    if not ends:
        return None
    end = ends[0]
    return Request(
        id=request_id,
        prompt=prompt[:end],
        boundaries=tuple(p for p in boundaries if p <= end),
        sampling=SamplingSettings(temperature=0.0),
        dial=build_dial(model, None, thinking=False),
        parser=ReplyParser(starts_in_thinking=False),
        max_tokens=None,
        ignore_eos=False,
        anchor=True,
    )


def _render(
    model: LoadedModel, messages: Sequence[Message], options: GenerateOptions, thinking: bool
) -> RenderedPrompt:
    return model.template.render(
        messages,
        tools=options.tools,
        enable_thinking=thinking,
        truncate_history_thinking=not options.keep_thinking,
        extra=template_effort(options.think, model.template.source),
    )


def tokenize_prompt(
    model: LoadedModel, rendered: RenderedPrompt
) -> tuple[list[int], tuple[int, ...]]:
    """Tokens of a prompt, and the token positions of its boundaries."""
    tokens: list[int] = []
    positions: list[int] = []
    for stretch in rendered.stretches():
        for segment in stretch:
            tokens += model.tokenize_again(segment.text, segment.special)
        positions.append(len(tokens))
    return tokens, tuple(positions[:-1])


def build_dial(
    model: LoadedModel, budget: int | None, *, thinking: bool, max_reply: int | None = None
) -> ReasoningDial:
    """The dial with this model's closing tokens."""
    return ReasoningDial(
        budget,
        thinking=thinking,
        close_after_text=model.tokenize(f"\n{END_THINK}\n", special=True),
        close_after_newline=model.tokenize(f"{END_THINK}\n", special=True),
        max_reply=max_reply,
    )
