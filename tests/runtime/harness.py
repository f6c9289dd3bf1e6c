"""Driving an engine by hand, and what its replies must equal: a fresh evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from nanorun.errors import NanorunError
from nanorun.model.chat import Event, Finished
from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.engine.engine import Engine
from nanorun.runtime.engine.request import Request
from nanorun.runtime.llama.context import Context
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.llama.row import Row
from nanorun.runtime.reply.reply import Reply, ReplySettings
from nanorun.runtime.sampling.draw import Logits
from nanorun.runtime.sampling.settings import SamplingSettings

SMALL = EngineOptions(
    n_ctx=512,
    n_parallel=3,
    n_seq_spare=2,
    n_batch=64,
    n_ubatch=64,
    n_threads=1,
    checkpoint_bytes=16 * 2**20,
    archive_bytes=16 * 2**20,
)


LAYOUTS = [(n_batch, n_before) for n_before in (0, 7, 40, 64) for n_batch in (64, 1, 3, 8, 20, 33)]
"""Sizes of batches, and cells of another sequence before."""


class RecordingReply(Reply):
    """A reply that keeps what it said, and the logits from which."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.logits: list[np.ndarray] = []
        self.tokens: list[int] = []
        self.forced: list[bool] = []
        """Whether the dial decided on a token: thinking that the model opened is held to half."""

    def pick(self, logits: Logits) -> int | None:
        self.logits.append(logits.copy())
        self.forced.append(bool(self.expected()))
        return super().pick(logits)

    def take(self, token: int) -> list[Event]:
        self.tokens.append(token)
        return super().take(token)


class Rig:
    """An engine on a file, fed with token prompts; records what it says and from which logits."""

    def __init__(self, path: Path, options: EngineOptions = SMALL) -> None:
        self.path = path
        self.options = options
        self._ids = count()
        self.prompts: dict[str, list[int]] = {}
        self.replies: dict[str, RecordingReply] = {}
        self.finished: dict[str, Finished | NanorunError] = {}
        self.batches: list[list[int]] = []
        """Tokens of each row, of every batch that was evaluated; a restart does not reset it."""
        self.open()

    def reopen(self) -> None:
        """Close everything and load the model anew, as a restart does."""
        self.close()
        self.open()

    def open(self) -> None:
        """Load the model."""
        model = LoadedModel(self.path, self.options)
        self.engine = Engine(model, self.options, self._new_reply)
        self._count_batches()
        alone = replace(
            self.options, n_ctx=self.options.n_ctx + 256, n_parallel=2, n_seq_spare=0,
            state_dir=None, speculation="off",
        )  # fmt: skip
        self._fresh = Context(self.engine.model, alone)

    def _count_batches(self) -> None:
        decode = self.engine.memory.decode

        def counted(rows: Sequence[Row]) -> list[int | None]:
            self.batches.append([len(row.tokens) for row in rows])
            return decode(rows)

        self.engine.memory.decode = counted  # type: ignore[method-assign]

    @property
    def n_evaluated(self) -> int:
        """Tokens that all replies together have cost so far, guesses included."""
        return sum(sum(batch) for batch in self.batches)

    def _new_reply(self, *args: Any) -> Reply:
        self._newest = RecordingReply(*args)
        return self._newest

    def close(self) -> None:
        self._fresh.close()
        self.engine.close()

    def submit(
        self,
        prompt: Sequence[int],
        *,
        n_tokens: int = 4,
        boundaries: Sequence[int] = (),
        background: bool = False,
        read_only: bool = False,
    ) -> str:
        request_id = f"t{next(self._ids)}"
        self.prompts[request_id] = list(prompt)
        settings = ReplySettings(
            SamplingSettings(temperature=0.0), max_tokens=n_tokens, ignore_eos=True
        )
        self.engine.submit(
            Request(
                request_id,
                np.array(prompt, np.int32),
                tuple(b for b in boundaries if 0 < b < len(prompt)),
                reply=None if read_only else settings,
                background=background,
            )
        )
        if not read_only:
            self.replies[request_id] = self._newest
        return request_id

    def said(self, request_id: str) -> list[int]:
        """The tokens of a reply so far."""
        reply = self.replies.get(request_id)
        return [] if reply is None else reply.tokens

    def step(self) -> None:
        for request_id, output in self.engine.step():
            if isinstance(output, Finished | NanorunError):
                self.finished[request_id] = output

    def strike(self, action: Callable[[], object]) -> None:
        """Let something happen in the middle of the next evaluation, as other threads do."""
        decode = self.engine.memory.decode

        def struck(rows: Sequence[Row]) -> list[int | None]:
            self.engine.memory.decode = decode  # type: ignore[method-assign]
            action()
            return decode(rows)

        self.engine.memory.decode = struck  # type: ignore[method-assign]

    def run(self) -> None:
        while self.engine.busy:
            self.step()

    def ask(self, prompt: Sequence[int], **options: Any) -> tuple[list[int], Finished]:
        """One reply, alone: its tokens and how it finished."""
        request_id = self.submit(prompt, **options)
        self.run()
        finished = self.finished[request_id]
        assert isinstance(finished, Finished), finished
        return self.said(request_id), finished

    def check(self, request_id: str, tolerance: float = 1e-2) -> None:
        """Compare a reply with a fresh evaluation: logits within `tolerance`, same tokens.

        Where the two best logits are closer than the tolerance the choice is a matter of rounding;
        the fresh evaluation then follows the reply's choice. Where two experts are tied, rounding
        decides which is used, and logits jump; rounding differs with the size of the batches and
        the place of the cells (docs/engine-hazards.md), so the reply may equal a fresh evaluation
        in any of some layouts.
        """
        problem = self._differs(request_id, tolerance, self.options.n_batch, 0)
        for n_batch, n_before in LAYOUTS:
            if problem is None:
                return
            if self._differs(request_id, tolerance, n_batch, n_before) is None:
                return
        assert problem is None, problem

    def _differs(
        self, request_id: str, tolerance: float, n_batch: int, n_before: int
    ) -> str | None:
        """What sets a reply apart from a fresh evaluation in one layout."""
        reply = self.replies[request_id]
        for seq_id in (0, 1):
            self._fresh.drop(seq_id)
        if n_before:  # other cells come first
            self._fresh.decode([Row(1, 0, list(range(32, 32 + n_before)), wants_logits=False)])
        pending, position = self.prompts[request_id], 0
        for token, seen, forced in zip(reply.tokens, reply.logits, reply.forced, strict=True):
            fresh = self._evaluate_fresh(pending, position, n_batch)
            difference = float(np.abs(fresh - seen).max())
            if difference >= tolerance:
                return f"{request_id} at {position}: logits differ by {difference}"
            best = int(fresh.argmax())
            if not forced and fresh[best] - fresh[token] > tolerance:
                return f"{request_id} said {token}, a fresh evaluation {best}"
            position += len(pending)
            pending = [token]
        return None

    def _evaluate_fresh(self, tokens: Sequence[int], position: int, n_batch: int) -> np.ndarray:
        for i in range(0, len(tokens), n_batch):
            piece = tokens[i : i + n_batch]
            last = i + n_batch >= len(tokens)
            (index,) = self._fresh.decode([Row(0, position + i, piece, wants_logits=last)])
        assert index is not None
        return self._fresh.logits(index).copy()
