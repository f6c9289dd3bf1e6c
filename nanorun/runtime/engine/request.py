"""From messages and options to what the engine runs: tokens, and how to answer them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanorun.chat.markup import THINK
from nanorun.chat.prompt import RenderedPrompt
from nanorun.errors import ModelError, UsageError
from nanorun.model.chat import GenerateOptions, Message
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.prompt_state.prefixes import Tokens
from nanorun.runtime.reply.constraint import Form
from nanorun.runtime.reply.dial import template_effort
from nanorun.runtime.reply.reply import ReplySettings
from nanorun.runtime.sampling.settings import settle_sampling

Check = Callable[[], None]
"""Called now and then by work that takes long; raises if nobody waits for it any more."""

SHORT_CHARS = 2**14
"""Text of this length is tokenized in some milliseconds, less than a batch takes."""


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


def is_short(messages: Sequence[Message]) -> bool:
    """Whether a prompt without tools is made in some milliseconds at most."""
    n_chars = sum(len(m.content) + len(m.thinking or "") for m in messages)
    return n_chars + sum(len(str(m.tool_calls)) for m in messages if m.tool_calls) <= SHORT_CHARS


def prepare_request(
    request_id: str,
    model: LoadedModel,
    messages: Sequence[Message],
    options: GenerateOptions,
    form: Form | None = None,
    check: Check = lambda: None,
) -> Request:
    """Render, tokenize and settle a request; in any thread.

    Args:
        request_id: Its name.
        model: The model.
        messages: The conversation.
        options: How to answer.
        form: What `forms.compile_form` made of the options.
        check: Called now and then; what it raises ends the work.

    Raises:
        UsageError: If the options or messages make no sense.
        ModelError: If the model's template makes nothing of the messages.
    """
    if not messages:
        raise UsageError("there are no messages to answer")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise UsageError(f"max_tokens {options.max_tokens} is less than 1")
    rendered = _render(model, messages, options)
    prompt, boundaries = tokenize_prompt(model, rendered, check)
    if not len(prompt):  # nothing to read is nothing to go on from: the engine would wait for it
        raise ModelError(
            f"the chat template of {model.path.name} makes no prompt of these messages"
        )
    thinks = not options.think.is_off and rendered.text.rstrip("\n").endswith(THINK)
    return Request(
        request_id, prompt, boundaries,
        reply=_settle(model, options, form, thinks=thinks),
        n_prefix=_n_before_question(messages, rendered, boundaries),
        background=options.priority == "background",
    )  # fmt: skip


def _n_before_question(
    messages: Sequence[Message], rendered: RenderedPrompt, positions: Sequence[int]
) -> int:
    """Tokens before the last turn of the user that no reply or tool result comes before; else 0."""
    said = (i for i, message in enumerate(messages) if message.role not in ("system", "user"))
    n_opening = next(said, len(messages))
    starts = [
        position
        for position, boundary in zip(positions, rendered.boundaries, strict=True)
        if boundary.kind != "generation" and boundary.i_message < n_opening
    ]
    return max(starts, default=0)


def _settle(
    model: LoadedModel, options: GenerateOptions, form: Form | None, *, thinks: bool
) -> ReplySettings:
    if options.grammar is not None and not options.tools:
        # A call would end the thinking and could not be part of the answer.
        no_call = (model.call_tokens[0], -math.inf)
        options = replace(options, logit_bias=(*options.logit_bias, no_call))
    sampling = settle_sampling(
        options, thinking=thinks, n_vocab=model.n_vocab, defaults=model.sampling_defaults
    )
    return ReplySettings(
        sampling,
        thinks=thinks,
        budget=options.think.budget,
        max_tokens=options.max_tokens,
        ignore_eos=options.ignore_eos,
        tools=options.tools,
        stop=options.stop,
        form=form,
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
    rendered = _render(model, following, options)
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
        request_id, prompt[:end], tuple(p for p in boundaries if p <= end),
        reply=None,
        n_prefix=_n_before_question(following, rendered, boundaries),
    )  # fmt: skip


def _render(
    model: LoadedModel, messages: Sequence[Message], options: GenerateOptions
) -> RenderedPrompt:
    return model.template.render(
        messages,
        tools=options.tools,
        enable_thinking=not options.think.is_off,
        truncate_history_thinking=not options.keep_thinking,
        extra=template_effort(options.think, model.template.source),
    )


def tokenize_prompt(
    model: LoadedModel, rendered: RenderedPrompt, check: Check = lambda: None
) -> tuple[Tokens, tuple[int, ...]]:
    """Tokens of a prompt, shape `(n_prompt,)`, and the token positions of its boundaries."""
    tokens = array("i")
    positions: list[int] = []
    for stretch in rendered.stretches():
        for segment in stretch:
            for part in model.tokenizer.parts(segment.text):
                check()
                tokens.extend(model.tokenize_again(part, segment.special))
        positions.append(len(tokens))
    return np.array(tokens, np.int32), tuple(positions[:-1])
