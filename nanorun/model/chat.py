"""A conversation as nanorun passes it around, and what a reply is made of.

Requests carry `Message`s and `GenerateOptions`; replies come back as a stream of events that ends
with `Finished`. All are plain frozen dataclasses, so they cross the pipe to the engine's process
(`runtime/process/wire.py`) and the HTTP endpoint without translation layers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nanorun.model.sampling import SamplingFields
from nanorun.model.think import MEDIUM, Think

Role = Literal["system", "user", "assistant", "tool"]
Priority = Literal["interactive", "background"]
FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool, with its arguments parsed."""

    id: str
    name: str
    arguments: dict[str, Any]


def arguments_text(call: ToolCall) -> str:
    """The JSON text of a call's arguments, as endpoints send it whole or in pieces."""
    return json.dumps(call.arguments, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str = ""
    thinking: str | None = None
    """What the assistant thought before `content`; None or "" if it did not."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """For role `tool`: the call this answers."""


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """A prompt that no template makes: a text or token ids, one of the two.

    The reply to it is plain text: no tool calls are read from it, and thinking only where the
    prompt ends with an open `<think>`.

    Raises:
        ValueError: If there is neither or both.
    """

    text: str | None = None
    tokens: tuple[int, ...] | None = None
    """Token ids, shape `(n_prompt,)`; nothing is put before them."""
    special: bool = True
    """Whether control tokens spelled in the text are control tokens."""
    add_bos: bool | None = None
    """Whether the text begins with BOS, where it does not already; None for what the model's file
    says."""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.tokens is None):
            raise ValueError("a raw prompt is either a text or tokens")


Prompt = Sequence[Message] | RawPrompt
"""What can be answered."""


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """What a model reads of a prompt, before it answers."""

    text: str
    """What the tokens stand for."""
    tokens: tuple[int, ...]
    """Token ids, shape `(n_prompt,)`."""
    boundaries: tuple[int, ...]
    """Token positions where other prompts may diverge: end of the system part, starts of turns."""
    thinks: bool
    """Whether the reply begins with thinking."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    """The schema as JSON, the regular expression, or a grammar in llguidance's Lark."""


@dataclass(frozen=True, slots=True)
class GenerateOptions(SamplingFields):
    """How to answer. None means the model family's own default for the mode."""

    think: Think = MEDIUM
    max_tokens: int | None = None
    """Most tokens of the reply, thinking included; None for what the context still holds."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it. Thinking is not searched."""
    tools: tuple[dict[str, Any], ...] = ()
    """Tools in OpenAI's form (`{"type": "function", "function": {...}}`)."""
    priority: Priority = "interactive"
    """A background reply is suspended while interactive ones need its place."""
    tool_choice: Literal["auto", "required"] = "auto"
    """Whether a tool must be called."""
    parallel_tool_calls: bool = True
    """Whether a reply may hold several calls."""
    grammar: Grammar | None = None
    """Holds the answer (not the thinking) to a form; tool calls stay possible."""
    ignore_eos: bool = False
    """Go on past the end of the turn, for benchmarks."""
    keep_thinking: bool = False
    """Leave the thinking of earlier turns in the prompt: append-only, and longer."""
    continue_final: bool = False
    """Go on with the last message, an assistant's, instead of answering it: with its content, or
    with its thinking if it has nothing else. The reply is only what is added."""
    echo_thinking: bool | None = True
    """Whether the next turn will carry this reply's thinking back; None if that is not known yet.
    Templates render a turn differently with and without it, so the engine reads ahead what it
    expects, or both."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; `completion_tokens` includes `thinking_tokens`."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose state was reused instead of evaluated."""
    cached_from: Literal["device", "host", "disk"] | None = None
    """Where that state was."""
    thinking_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    """Tokens that were guessed ahead."""
    accepted_tokens: int = 0
    """Those of them that the reply kept."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one request went."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prefill_tps: float = 0.0
    """Evaluated (not cached) prompt tokens per second."""
    decode_tps: float = 0.0


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """How far the prompt is read; sent at least once, before the first token."""

    n_done: int
    n_total: int
    n_cached: int


@dataclass(frozen=True, slots=True)
class ThinkingDelta:
    """More text of the thinking."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a token was; sent, if asked for, before the text it is part of."""

    piece: bytes
    logprob: float
    """Natural logarithm, before temperature and filters."""
    alternatives: tuple[tuple[bytes, float], ...] = ()
    in_thinking: bool = False


@dataclass(frozen=True, slots=True)
class ToolCallBegun:
    """The model began to call a tool; pieces of its arguments follow, then the `ToolCallDelta`."""

    index: int
    """Its place among the calls that were begun."""
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """More of the JSON text of a call's arguments, as the model writes them.

    The pieces of a call make `arguments_text` of it. Those of a call that broke off, which its
    `problem` tells, are a beginning of a JSON object that never ends, so nobody can take half a
    call for a whole one.
    """

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A tool call, complete; `problem` says what was wrong with it, if anything."""

    index: int
    """Its place among the calls that were begun; one that could not be read at all, and so has no
    name, was never begun and bears the index of the next."""
    call: ToolCall
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the person should know: a restart, a changed plan."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a reply."""

    reason: FinishReason
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
    stop_text: str | None = None
    """The stop string that ended the answer, if one did."""
    refusal: str | None = None
    """What a check found wrong with a complete answer that no grammar could hold to its schema."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine holds right now."""

    n_running: int
    n_waiting: int
    n_sequences: int
    """Sequences on the device, running or kept for later prompts."""
    n_cells: int
    """KV cells of the context."""
    n_cells_used: int
    checkpoint_bytes: int
    """Host memory of the states saved along the sequences."""
    archive_bytes: int
    """Host memory of the sequences that left the device."""


Event = (
    PrefillProgress
    | ThinkingDelta
    | TextDelta
    | TokenLogprobs
    | ToolCallBegun
    | ToolArguments
    | ToolCallDelta
    | Notice
    | Finished
)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What an opened model is, as its users need to know it."""

    name: str
    path: str
    arch: str
    """`general.architecture` of the file."""
    n_params: int
    file_bytes: int
    n_vocab: int
    n_layer: int
    n_ctx: int
    """Tokens the opened context holds."""
    n_ctx_train: int
    n_seq_max: int
    recipe: str | None
    load_s: float
    device: str
