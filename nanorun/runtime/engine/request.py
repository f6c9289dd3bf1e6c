"""From messages and options to what the engine runs: tokens, and how to answer them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanorun.errors import UsageError
from nanorun.model.chat import GenerateOptions, Message, Prompt
from nanorun.runtime.engine.prompts import (
    Check,
    MadePrompt,
    make_prompt,
    n_before_question,
    render,
    tokenize_prompt,
)
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.prompt_state.prefixes import Tokens
from nanorun.runtime.reply.constraint import Form
from nanorun.runtime.reply.reply import ReplySettings
from nanorun.runtime.sampling.settings import settle_sampling


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """What the engine is asked for; never changed."""

    id: str
    prompt: Tokens
    """Token ids, shape `(n_prompt,)`."""
    boundaries: tuple[int, ...]
    """Token positions where another prompt may diverge: end of the system part, start of turns."""
    reply: ReplySettings | None
    """How to answer; None to read the prompt only, in idle time, for the sake of the next turn."""
    n_prefix: int = 0
    """Tokens before the first question, one of the boundaries: the system part and tools, and what
    a client says in turns of the user before it. Other conversations begin with them as well."""
    background: bool = False
    """Give way to requests that somebody waits for."""
    notices: tuple[str, ...] = ()
    """What its sender should know before the reply."""


def prepare_request(
    request_id: str,
    model: LoadedModel,
    prompt: Prompt,
    options: GenerateOptions,
    form: Form | None = None,
    check: Check = lambda: None,
) -> Request:
    """Render, tokenize and settle a request; in any thread.

    Args:
        request_id: Its name.
        model: The model.
        prompt: The conversation, or a raw prompt.
        options: How to answer.
        form: What `forms.compile_form` made of the options.
        check: Called now and then; what it raises ends the work.

    Raises:
        UsageError: If the options, messages or tokens make no sense.
        ModelError: If the model's template makes nothing of the messages.
    """
    if options.max_tokens is not None and options.max_tokens < 1:
        raise UsageError(f"max_tokens {options.max_tokens} is less than 1")
    made = make_prompt(model, prompt, options, check)
    return Request(
        request_id,
        made.tokens,
        made.boundaries,
        reply=_settle(model, options, form, made),
        n_prefix=made.n_prefix,
        background=options.priority == "background",
        notices=made.notices,
    )


def _settle(
    model: LoadedModel, options: GenerateOptions, form: Form | None, prompt: MadePrompt
) -> ReplySettings:
    if options.grammar is not None and not options.tools:
        # A call would end the thinking and could not be part of the answer.
        no_call = (model.call_tokens[0], -math.inf)
        options = replace(options, logit_bias=(*options.logit_bias, no_call))
    sampling = settle_sampling(
        options, thinking=prompt.thinks, n_vocab=model.n_vocab, defaults=model.sampling_defaults
    )
    return ReplySettings(
        sampling,
        thinks=prompt.thinks,
        budget=options.think.budget,
        max_tokens=options.max_tokens,
        ignore_eos=options.ignore_eos,
        tools=options.tools,
        stop=options.stop,
        form=form,
        plain=prompt.plain,
        begun=prompt.begun,
    )


def prepare_reading(
    request_id: str,
    model: LoadedModel,
    messages: Sequence[Message],
    reply: Message,
    options: GenerateOptions,
    check: Check = lambda: None,
) -> Request | None:
    """What the next turn will begin with, known as soon as a reply is complete.

    The template drops a turn's thinking once another user message follows, so the sequence that
    produced the reply does not fit the next prompt. Reading that prompt's known part ahead makes
    the next question cost its own tokens only. The template may render the reply differently with
    its thinking, so it is to be given as the next turn will have it.
    """
    following = [*messages, reply, Message("user", "?")]
    rendered = render(model, following, options)
    prompt, boundaries = tokenize_prompt(model, rendered, check)
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
        request_id,
        prompt[:end],
        tuple(p for p in boundaries if p <= end),
        reply=None,
        n_prefix=n_before_question(following, rendered, boundaries),
    )
