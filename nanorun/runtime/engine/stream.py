"""A request on its way through the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from nanorun.model.chat import PrefillProgress, Timings, Usage
from nanorun.runtime.drafting.drafter import next_draft_length
from nanorun.runtime.engine.request import Request
from nanorun.runtime.prompt_state.branch import Branch, Place
from nanorun.runtime.prompt_state.prefixes import Tokens
from nanorun.runtime.sampling.sampler import Sampler


@dataclass(eq=False, slots=True)
class Stream:
    """A request, the sequence it runs in, and how far it is."""

    request: Request
    order: int = 0
    """When it came, among all."""
    prompt: Tokens = field(init=False)
    """What has to be read before a token can be picked: the request's prompt or, after a
    suspension, all of the sequence."""
    submitted: float = field(default_factory=time.monotonic)
    branch: Branch | None = None
    sampler: Sampler | None = None
    pending: int | None = None
    """The last picked token, not yet evaluated."""
    stops: set[int] = field(default_factory=set)
    """Prompt positions where prefill pauses, for a checkpoint or another request's fork."""
    drafts: list[int] = field(default_factory=list)
    """Guesses at what follows `pending`, to be checked in the next batch."""
    n_draft: int = 1
    """Tokens to guess next time."""
    n_drafted: int = 0
    n_accepted: int = 0
    n_ends_refused: int = 0
    """Times that an end was not accepted, because the reply had thought and not answered."""
    n_completion: int = 0
    cancelled: bool = False
    started: float = 0.0
    first_token: float = 0.0
    n_cached: int = 0
    cached_from: Place | None = None

    def __post_init__(self) -> None:
        self.prompt = np.asarray(self.request.prompt, np.int32)

    @property
    def turn(self) -> tuple[bool, bool, int]:
        """Sorts streams: who is served first, and who gives way last."""
        return (self.request.anchor, self.request.background, self.order)

    @property
    def n_evaluated(self) -> int:
        """Tokens of this stream that the engine has read."""
        return self.branch.n_tokens if self.branch else 0

    @property
    def in_prefill(self) -> bool:
        """Whether prompt tokens are left to evaluate."""
        return self.n_evaluated < len(self.prompt)

    def start(self, branch: Branch) -> None:
        """Begin, or go on after a suspension, in a sequence that holds some of the tokens."""
        self.branch = branch
        self.stops |= {p for p in self.request.boundaries if p > branch.n_tokens}
        if not self.started:
            self.started = time.monotonic()
            self.n_cached = branch.n_cached
            self.cached_from = branch.cached_from if branch.n_cached else None

    def suspend(self) -> Branch:
        """Give the sequence back; `start` goes on where this left off."""
        branch = self.branch
        assert branch is not None
        if self.pending is not None:
            self.prompt = np.append(branch.tokens, self.pending).astype(np.int32)
        self.branch = self.pending = None
        self.drafts = []
        return branch

    @property
    def may_guess(self) -> bool:
        """Whether the next tokens are the model's own choice, so that guessing makes sense."""
        is_free = self.request.constraint is None and self.request.dial.forced() is None
        return is_free and not self.in_prefill and self.pending is not None

    def note_drafts(self, n_drafted: int, n_accepted: int, n_most: int) -> None:
        """Count guesses, and guess as much next time as these suggest."""
        self.n_drafted += n_drafted
        self.n_accepted += n_accepted
        self.n_draft = next_draft_length(n_drafted, n_accepted, n_most)
        self.drafts = []

    def progress(self, n_read: int | None = None) -> PrefillProgress:
        """How far the prompt is read."""
        n_total = len(self.request.prompt)
        n_done = self.n_evaluated if n_read is None else n_read
        return PrefillProgress(min(n_done, n_total), n_total, self.n_cached)

    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.n_cached,
            cached_from=self.cached_from,
            thinking_tokens=self.request.dial.n_thinking,
            completion_tokens=self.n_completion,
            drafted_tokens=self.n_drafted,
            accepted_tokens=self.n_accepted,
        )

    def timings(self) -> Timings:
        """Where the time went so far."""
        now = time.monotonic()
        if not self.started:
            return Timings(queue_s=now - self.submitted)
        prefill_s = (self.first_token or now) - self.started
        decode_s = now - self.first_token if self.first_token else 0.0
        n_read = max(0, min(self.n_evaluated, len(self.request.prompt)) - self.n_cached)
        return Timings(
            queue_s=self.started - self.submitted,
            prefill_s=prefill_s,
            decode_s=decode_s,
            prefill_tps=n_read / prefill_s if prefill_s else 0.0,
            decode_tps=max(0, self.n_completion - 1) / decode_s if decode_s else 0.0,
        )
