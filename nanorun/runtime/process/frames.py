"""What the engine's process is asked and what it answers, one class a verb and an answer.

Requests go to `runtime/worker.py`; each carries the id that its answers bear. `Call` and its
answers are those of a job (`process/job.py`). None of them is changed on its way (`wire.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanorun.errors import NanorunError
from nanorun.model.chat import (
    EngineStats,
    Event,
    GenerateOptions,
    Message,
    ModelInfo,
    PromptTokens,
    RawPrompt,
)
from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.process.wire import Codec


@dataclass(frozen=True, slots=True)
class Open:
    """Open a model: the first request of all; answered by `Ready`."""

    id: str
    path: str
    options: EngineOptions


@dataclass(frozen=True, slots=True)
class Ping:
    """Give a sign of life; answered by `Pong`, even while a batch is evaluated."""

    id: str


@dataclass(frozen=True, slots=True)
class Close:
    """Save what is worth it, and end."""

    id: str


@dataclass(frozen=True, slots=True)
class Generate:
    """Answer a conversation or a raw prompt; answered by `Said` until a `Finished` is said."""

    id: str
    prompt: tuple[Message, ...] | RawPrompt
    options: GenerateOptions


@dataclass(frozen=True, slots=True)
class Cancel:
    """End the reply of this id."""

    id: str


@dataclass(frozen=True, slots=True)
class FinishThinking:
    """Make the reply of this id answer soon."""

    id: str


@dataclass(frozen=True, slots=True)
class SetBudget:
    """Change the thinking tokens of the reply of this id."""

    id: str
    n_tokens: int | None
    """None for no limit."""


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Answered by `Tokens`."""

    id: str
    text: str
    special: bool
    """Whether texts of control tokens become control tokens."""


@dataclass(frozen=True, slots=True)
class Detokenize:
    """Answered by `Pieces`."""

    id: str
    tokens: tuple[int, ...]
    special: bool
    """Whether control tokens give their texts; else they give nothing."""


@dataclass(frozen=True, slots=True)
class Render:
    """Make a prompt as for a `Generate`, and answer nothing; answered by `Rendered`."""

    id: str
    prompt: tuple[Message, ...] | RawPrompt
    options: GenerateOptions
    counts_only: bool
    """Whether the number of tokens is all that is asked."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Answered by `Statistics`."""

    id: str


@dataclass(frozen=True, slots=True)
class ChangeSpare:
    """Hold less, or allow more, of what can be made again; answered by `SpareChanged`."""

    id: str
    n_bytes: int
    """Below 0: that much less than is held now, at once. Above: that much more than was allowed,
    within the plan."""


@dataclass(frozen=True, slots=True)
class Score:
    """Measure the perplexity of a text; answered by `Progress` and `Scored`."""

    id: str
    text: str
    n_ctx: int


Request = (
    Open
    | Ping
    | Close
    | Generate
    | Cancel
    | FinishThinking
    | SetBudget
    | Tokenize
    | Detokenize
    | Render
    | Stats
    | ChangeSpare
    | Score
)


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded."""

    id: str
    info: ModelInfo


@dataclass(frozen=True, slots=True)
class Pong:
    """The process is alive."""

    id: str
    n_steps: int | None
    """Batches evaluated so far, while one is; None while the engine waits."""


@dataclass(frozen=True, slots=True)
class Said:
    """An event of a reply."""

    id: str
    event: Event


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended with an error."""

    id: str
    error: NanorunError


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long request is."""

    id: str
    values: tuple[Any, ...]
    """As JSON can hold them; for a `Score` the tokens done and all tokens, for an `Open` the part
    of the weights that is read."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of a text."""

    id: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pieces:
    """The bytes that tokens stand for, one item a token."""

    id: str
    pieces: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Rendered:
    """What the model would read."""

    id: str
    n_tokens: int
    prompt: PromptTokens | None
    """None if only the number was asked."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the engine holds."""

    id: str
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class SpareChanged:
    """What is held of what can be made again."""

    id: str
    held_bytes: int
    limit_bytes: int
    """What it may come to."""
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class Scored:
    """Perplexity of a text."""

    id: str
    n_tokens: int
    """Predictions that counted."""
    ppl: float


Answer = (
    Ready
    | Pong
    | Said
    | Failed
    | Progress
    | Tokens
    | Pieces
    | Rendered
    | Statistics
    | SpareChanged
    | Scored
)


@dataclass(frozen=True, slots=True)
class Call:
    """Run a job: the only request of its process."""

    job: str
    """`module:function`."""
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """What a job returned, as JSON can hold it."""

    id: str
    value: Any


JobAnswer = Progress | Result | Failed

REQUESTS: Codec[Request] = Codec(Request)
ANSWERS: Codec[Answer] = Codec(Answer)
CALLS: Codec[Call] = Codec(Call)
JOB_ANSWERS: Codec[JobAnswer] = Codec(JobAnswer)
