"""From messages and options to what the engine runs: tokens, stops, sampler, dial, parser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanorun.chat.parser import ReplyParser
from nanorun.chat.prompt import RenderedPrompt
from nanorun.errors import UsageError
from nanorun.model.chat import GenerateOptions, Message
from nanorun.runtime.model import LoadedModel
from nanorun.runtime.reasoning import ReasoningDial, parse_think
from nanorun.runtime.sampling import SamplingSettings, settle_sampling


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
    anchor: bool = False
    """Only read the prompt, in idle time, for the sake of the next turn."""


def prepare_request(
    request_id: str, model: LoadedModel, messages: Sequence[Message], options: GenerateOptions
) -> Request:
    """Render, tokenize and settle a request.

    Raises:
        UsageError: If the options or messages make no sense.
    """
    if not messages:
        raise UsageError("there are no messages to answer")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise UsageError(f"max_tokens {options.max_tokens} is less than 1")
    budget = parse_think(options.think)
    thinking = budget != 0
    rendered = _render(model, messages, options, thinking)
    prompt, boundaries = tokenize_prompt(model, rendered)
    thinking = thinking and rendered.text.rstrip("\n").endswith("<think>")
    return Request(
        id=request_id,
        prompt=prompt,
        boundaries=boundaries,
        sampling=settle_sampling(
            options, thinking=thinking, n_vocab=model.n_vocab, defaults=model.sampling_defaults
        ),
        dial=build_dial(model, budget, thinking=thinking, max_reply=options.max_tokens),
        parser=ReplyParser(starts_in_thinking=thinking, tools=options.tools, stop=options.stop),
        max_tokens=options.max_tokens,
        ignore_eos=options.ignore_eos,
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
    the next question cost its own tokens only.
    """
    if not options.echo_thinking:
        reply = replace(reply, thinking=None)
    thinking = parse_think(options.think) != 0
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
    )


def tokenize_prompt(
    model: LoadedModel, rendered: RenderedPrompt
) -> tuple[list[int], tuple[int, ...]]:
    """Tokens of a prompt, and the token positions of its boundaries."""
    tokens: list[int] = []
    positions: list[int] = []
    for stretch in rendered.stretches():
        for segment in stretch:
            tokens += model.tokenize(segment.text, special=segment.special)
        positions.append(len(tokens))
    return tokens, tuple(positions[:-1])


def build_dial(
    model: LoadedModel, budget: int | None, *, thinking: bool, max_reply: int | None = None
) -> ReasoningDial:
    """The dial with this model's closing tokens."""
    return ReasoningDial(
        budget,
        thinking=thinking,
        close_after_text=model.tokenize("\n</think>\n", special=True),
        close_after_newline=model.tokenize("</think>\n", special=True),
        max_reply=max_reply,
    )
