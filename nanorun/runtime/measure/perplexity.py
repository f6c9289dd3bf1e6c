"""How well a model predicts a text: perplexity, by the method of llama.cpp's `llama-perplexity`.

The text is cut into chunks of `n_ctx` tokens, each read from an empty context; only predictions in
the second half of a chunk count, so that each has at least half a context before it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nanorun.errors import UsageError
from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.llama.context import Context
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.llama.row import Row

N_ROWS = 128
"""Rows of logits held at once: 64 MiB at a vocabulary of 131,072."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """Perplexity of a text."""

    n_tokens: int
    """Predictions that counted."""
    ppl: float


@dataclass(frozen=True, slots=True)
class Predictions:
    """What was predicted at some positions, and what came."""

    logits: NDArray[np.float32]
    """`(n, n_vocab)`; a view until the next decode."""
    targets: NDArray[np.int64]
    """The tokens that came, `(n,)`."""


@dataclass(frozen=True, slots=True)
class Source:
    """A text, and how it becomes chunks of tokens."""

    text: str
    n_ctx: int
    """Tokens of a chunk; what does not fill the last one is left out."""
    special: bool = False
    """Whether texts of control tokens become control tokens."""

    @property
    def sha256(self) -> str:
        """Of the text, in hex."""
        return hashlib.sha256(self.text.encode("utf-8", "replace")).hexdigest()

    def chunks(self, model: LoadedModel) -> list[list[int]]:
        """The tokens in chunks, each begun by BOS where the model wants one.

        Raises:
            UsageError: If the text or `n_ctx` is too short.
        """
        tokens = model.tokenize(self.text, special=self.special)
        if model.adds_bos:
            tokens.insert(0, model.bos)
        n_ctx = min(self.n_ctx, len(tokens))
        if n_ctx < 4:
            raise UsageError(
                f"a text of {len(tokens)} tokens in chunks of {n_ctx} is too short to score"
            )
        chunks = [tokens[i : i + n_ctx] for i in range(0, len(tokens) - n_ctx + 1, n_ctx)]
        return [[model.bos, *chunk[1:]] for chunk in chunks] if model.adds_bos else chunks


def score_text(
    model: LoadedModel,
    options: EngineOptions,
    text: str,
    n_ctx: int,
    progress: Progress | None = None,
    check: Callable[[], None] = lambda: None,
) -> ScoreResult:
    """Perplexity of a text, in a context of its own.

    Args:
        model: The loaded model.
        options: Threads and types; sizes are replaced.
        text: At least two tokens.
        n_ctx: Tokens of a chunk; a shorter text is one chunk.
        progress: Called with chunks done and chunks in all.
        check: Called now and then; what it raises ends the work.

    Raises:
        UsageError: If the text or `n_ctx` is too short.
    """
    loss, n_scored = 0.0, 0
    chunks = Source(text, n_ctx).chunks(model)
    with closing(predictions(model, options, chunks, progress)) as parts:
        for part in parts:
            check()
            losses = -log_softmax(part.logits)[np.arange(len(part.targets)), part.targets]
            loss += float(losses.sum())
            n_scored += len(losses)
    return ScoreResult(n_scored, math.exp(loss / n_scored))


def predictions(
    model: LoadedModel,
    options: EngineOptions,
    chunks: Sequence[list[int]],
    progress: Progress | None = None,
) -> Generator[Predictions]:
    """The predictions that count, some rows at a time, in the order of the text."""
    sizes = replace(
        options, n_ctx=len(chunks[0]), n_parallel=1, n_seq_spare=0, n_batch=N_ROWS,
        n_ubatch=N_ROWS,
    )  # fmt: skip
    context = Context(model, sizes, n_outputs_max=N_ROWS)
    try:
        for i, chunk in enumerate(chunks):
            yield from chunk_predictions(context, chunk)
            if progress is not None:
                progress(i + 1, len(chunks))
    finally:
        context.close()


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural log probabilities of rows of logits; `(..., n_vocab)` in, the same out."""
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def chunk_predictions(context: Context, chunk: list[int]) -> Iterator[Predictions]:
    """The predictions of the second half of a chunk."""
    context.drop(0)
    first, last = len(chunk) // 2, len(chunk) - 1
    for start in [*range(0, first, N_ROWS), *range(first, len(chunk), N_ROWS)]:
        end = min(start + N_ROWS, first if start < first else len(chunk))
        scored = start >= first
        row = Row(0, start, chunk[start:end], wants_logits=scored, all_logits=scored)
        (index,) = context.decode([row])
        n = min(end, last) - start
        if index is not None and n > 0:
            logits = context.logits_of(index, n)
            yield Predictions(logits, np.array(chunk[start + 1 : start + 1 + n]))
