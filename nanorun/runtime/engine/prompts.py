"""From a conversation, or a raw prompt, to tokens: in any thread."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from nanorun.chat.markup import THINK
from nanorun.chat.prompt import RenderedPrompt
from nanorun.errors import ModelError, UsageError
from nanorun.model.chat import GenerateOptions, Message, Prompt, RawPrompt
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.prompt_state.prefixes import Tokens
from nanorun.runtime.reply.dial import template_effort

Check = Callable[[], None]
"""Called now and then by work that takes long; raises if nobody waits for it any more."""

SHORT_CHARS = 2**14
"""Text of this length is tokenized in some milliseconds, less than a batch takes."""
_LOST_BLANKS = (
    "the model's chat template leaves out white space at the end of a message, so the reply goes "
    "on without it"
)
_N_WORTH_KEEPING = 64
"""Tokens of a raw prompt from which on it is worth a checkpoint at its end."""


@dataclass(frozen=True, eq=False, slots=True)
class MadePrompt:
    """A prompt's tokens, and what they mean for the reply."""

    tokens: Tokens
    """Token ids, shape `(n_prompt,)`; at least one."""
    boundaries: tuple[int, ...]
    """Token positions where another prompt may diverge."""
    thinks: bool
    """Whether it ends with an open `<think>`."""
    n_prefix: int = 0
    """Tokens before the first question, which other conversations begin with as well."""
    plain: bool = False
    """Whether it is a raw prompt, so that nothing is read from the reply."""
    begun: str | None = None
    """The thinking or answer that it ends with, to be continued; None if the reply begins."""
    notices: tuple[str, ...] = ()
    """What its sender should know."""


def is_short(prompt: Prompt) -> bool:
    """Whether a prompt without tools is made in some milliseconds at most."""
    if isinstance(prompt, RawPrompt):
        return len(prompt.text or prompt.tokens or ()) <= SHORT_CHARS
    n_chars = sum(len(m.content) + len(m.thinking or "") for m in prompt)
    return n_chars + sum(len(str(m.tool_calls)) for m in prompt if m.tool_calls) <= SHORT_CHARS


def make_prompt(
    model: LoadedModel, prompt: Prompt, options: GenerateOptions, check: Check = lambda: None
) -> MadePrompt:
    """The tokens of what is to be answered.

    Raises:
        UsageError: If there is nothing to answer, or a token that the model does not have.
        ModelError: If the model's template makes nothing of the messages.
    """
    if isinstance(prompt, RawPrompt):
        return _make_raw(model, prompt, options, check)
    if not prompt:
        raise UsageError("there are no messages to answer")
    if options.continue_final:
        return _make_continued(model, prompt, options, check)
    rendered = render(model, prompt, options)
    tokens, boundaries = tokenize_prompt(model, rendered, check)
    if not len(tokens):  # nothing to read is nothing to go on from: the engine would wait for it
        raise ModelError(
            f"the chat template of {model.path.name} makes no prompt of these messages"
        )
    thinks = not options.think.is_off and rendered.text.rstrip("\n").endswith(THINK)
    return MadePrompt(tokens, boundaries, thinks, n_before_question(prompt, rendered, boundaries))


def n_before_question(
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


def render(
    model: LoadedModel, messages: Sequence[Message], options: GenerateOptions
) -> RenderedPrompt:
    """What the model's template makes of a conversation.

    Raises:
        UsageError: If it refuses the messages.
        ModelError: If it fails.
    """
    return model.template.render(messages, **_template_options(model, options))


class _TemplateOptions(TypedDict):
    tools: Sequence[Mapping[str, Any]]
    enable_thinking: bool
    truncate_history_thinking: bool
    extra: Mapping[str, Any]


def _template_options(model: LoadedModel, options: GenerateOptions) -> _TemplateOptions:
    return {
        "tools": options.tools,
        "enable_thinking": not options.think.is_off,
        "truncate_history_thinking": not options.keep_thinking,
        "extra": template_effort(options.think, model.template.source),
    }


def _make_continued(
    model: LoadedModel, messages: Sequence[Message], options: GenerateOptions, check: Check
) -> MadePrompt:
    """The prompt that ends where the last message does."""
    last = messages[-1]
    if last.role != "assistant":
        raise UsageError(
            f"only an assistant's message can be continued, and the last is of role {last.role}"
        )
    if last.tool_calls:
        raise UsageError("a message with tool calls cannot be continued: it is complete")
    begun = model.template.render_begun(messages, **_template_options(model, options))
    if options.grammar is not None and not begun.in_thinking:
        raise UsageError("an answer that is continued cannot be held to a grammar from its middle")
    tokens, boundaries = tokenize_prompt(model, begun.prompt, check)
    return MadePrompt(
        tokens,
        boundaries,
        begun.in_thinking,
        n_before_question(messages, begun.prompt, boundaries),
        begun=begun.text,
        notices=(_LOST_BLANKS,) if begun.lost_blanks else (),
    )


def tokenize_prompt(
    model: LoadedModel, rendered: RenderedPrompt, check: Check = lambda: None
) -> tuple[Tokens, tuple[int, ...]]:
    """Tokens of a prompt, shape `(n_prompt,)`, and the token positions of its boundaries."""
    tokens = array("i")
    positions: list[int] = []
    for stretch in rendered.stretches():
        for segment in stretch:
            _extend(tokens, model, segment.text, special=segment.special, check=check)
        positions.append(len(tokens))
    return np.array(tokens, np.int32), tuple(positions[:-1])


def _extend(
    tokens: array[int], model: LoadedModel, text: str, *, special: bool, check: Check
) -> None:
    """Append the tokens of a text."""
    for part in model.tokenizer.parts(text):
        check()
        tokens.extend(model.tokenize_again(part, special))


# -- raw prompts ----------------------------------------------------------------------------------


def _make_raw(
    model: LoadedModel, prompt: RawPrompt, options: GenerateOptions, check: Check
) -> MadePrompt:
    _check_raw_options(options)
    if prompt.tokens is None:
        tokens = _tokens_of_text(model, prompt, check)
    else:
        check_tokens(prompt.tokens, model.n_vocab)
        tokens = np.array(prompt.tokens, np.int32)
    if not len(tokens):
        raise UsageError("the prompt is empty, so there is nothing to go on from")
    thinks = _opens_thinking(model, tokens)
    return MadePrompt(tokens, _raw_boundaries(model, tokens), thinks, plain=True)


def _check_raw_options(options: GenerateOptions) -> None:
    """Refuse what has no meaning for a raw prompt.

    Raises:
        UsageError: If tools are offered, or a last message is to be continued.
    """
    if options.continue_final:
        raise UsageError("a raw prompt has no last message that could be continued")
    if options.tools:
        raise UsageError(
            "a raw prompt cannot offer tools: no template tells the model of them",
            facts=[f"{len(options.tools)} were offered"],
        )


def _tokens_of_text(model: LoadedModel, prompt: RawPrompt, check: Check) -> Tokens:
    tokens = array("i")
    _extend(tokens, model, prompt.text or "", special=prompt.special, check=check)
    adds_bos = model.adds_bos if prompt.add_bos is None else prompt.add_bos
    if adds_bos and (not tokens or tokens[0] != model.bos):
        tokens.insert(0, model.bos)
    return np.array(tokens, np.int32)


def check_tokens(tokens: Sequence[int], n_vocab: int) -> None:
    """Refuse ids that the vocabulary does not have.

    Raises:
        UsageError: Naming the first, and where it stands.
    """
    for i, token in enumerate(tokens):
        if not 0 <= token < n_vocab:
            raise UsageError(
                f"token {token} at place {i} is none of the model's",
                facts=[f"its tokens are 0 to {n_vocab - 1}; places are counted from 0"],
            )


def _opens_thinking(model: LoadedModel, tokens: Tokens) -> bool:
    """Whether a raw prompt ends with a `<think>`, but for line breaks."""
    for token in tokens[::-1]:
        piece = model.piece(int(token))
        if piece.strip(b"\n"):
            return piece == THINK.encode()
    return False


def _raw_boundaries(model: LoadedModel, tokens: Tokens) -> tuple[int, ...]:
    """Starts of turns, and all but the last token: the same prompt may come again."""
    places: set[int] = set()
    if model.turn_token is not None:
        places.update(np.flatnonzero(tokens == model.turn_token).tolist())
    if len(tokens) > _N_WORTH_KEEPING:
        places.add(len(tokens) - 1)
    return tuple(sorted(places - {0}))
