"""Where a request stands in the context: tokens only, no text."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from nanorun.model.chat import PrefillProgress, Timings, Usage
from nanorun.runtime.drafting.drafter import next_draft_length
from nanorun.runtime.engine.request import Request
from nanorun.runtime.prompt_state.branch import Branch, Place
from nanorun.runtime.prompt_state.prefixes import Tokens
from nanorun.runtime.reply.reply import Advance, Reply

Turn = tuple[bool, bool, int]
"""Sorts sequences: who is served first, and who gives way last."""


@dataclass(eq=False, slots=True)
class Sequence:
    """A request on its way through the engine, the branch it runs in, and how far it is."""

    request: Request
    order: int = 0
    """When it came, among all."""
    reply: Reply | None = None
    """What is said after the prompt; None if the prompt is only read."""
    turn: Turn = field(init=False)
    """Who is answered comes before who is in the background, and reading ahead comes last."""
    prompt: Tokens = field(init=False)
    """What has to be read before a token can be picked: the request's prompt or, after a
    suspension, all of the sequence."""
    branch: Branch | None = None
    pending: int | None = None
    """The last picked token, not yet evaluated."""
    drafts: list[int] = field(default_factory=list)
    """Guesses at what follows `pending`, to be checked in the next batch."""
    pauses: set[int] = field(default_factory=set)
    """Prompt positions where prefill pauses, for a checkpoint or another request's fork."""
    n_draft: int = 1
    """Tokens to guess next time."""
    n_drafted: int = 0
    n_accepted: int = 0
    n_overtaken: int = 0
    """Later requests that were admitted while there was no room for this one."""
    n_prefix: int = 0
    """Tokens that other conversations begin with as well."""
    cancelled: bool = False
    n_cached: int = 0
    cached_from: Place | None = None
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    first_token: float = 0.0

    def __post_init__(self) -> None:
        self.prompt = self.request.prompt
        self.turn = (self.is_read_only, self.request.background, self.order)
        self.n_prefix = self.request.n_prefix

    @property
    def is_read_only(self) -> bool:
        """Whether nothing is said after the prompt: it is read ahead of a next turn."""
        return self.reply is None

    @property
    def n_evaluated(self) -> int:
        """Tokens that the engine has read."""
        return self.branch.n_tokens if self.branch else 0

    @property
    def n_to_read(self) -> int:
        """Prompt tokens that are left to evaluate."""
        return max(0, len(self.prompt) - self.n_evaluated)

    @property
    def in_prefill(self) -> bool:
        """Whether there are any."""
        branch = self.branch  # asked several times a token
        return len(self.prompt) > (len(branch.tokens) if branch is not None else 0)

    def start(self, branch: Branch) -> None:
        """Begin, or go on after a suspension, in a branch that holds some of the tokens."""
        self.branch = branch
        self.pauses |= {p for p in self.request.boundaries if p > branch.n_tokens}
        if not self.started:
            self._note_prefix(branch.n_tokens)
            self.started = time.monotonic()
            self.n_cached = branch.n_cached
            self.cached_from = branch.cached_from if branch.n_cached else None

    def _note_prefix(self, n_begun_with: int) -> None:
        """What was read up to amid its first question was read for another conversation."""
        after = [p for p in self.request.boundaries if p > self.n_prefix]
        if after and self.n_prefix < n_begun_with < after[0]:
            self.n_prefix = n_begun_with

    def suspend(self) -> Branch:
        """Give the branch back; `start` goes on where this left off."""
        branch = self.branch
        assert branch is not None
        if self.pending is not None:
            self.prompt = np.append(branch.tokens, self.pending).astype(np.int32)
        self.branch = self.pending = None
        self.drafts = []
        return branch

    def note(self, advance: Advance, n_most_drafts: int) -> None:
        """Go on with what the reply said, and guess as much next time as its checks suggest."""
        self.first_token = self.first_token or time.monotonic()
        if advance.token is not None:
            self.pending = advance.token
        if self.drafts:
            n_drafted, n_accepted = len(self.drafts), advance.n_accepted
            self.n_drafted += n_drafted
            self.n_accepted += n_accepted
            self.n_draft = next_draft_length(n_drafted, n_accepted, n_most_drafts)
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
            thinking_tokens=self.reply.n_thinking if self.reply else 0,
            completion_tokens=self.reply.n_tokens if self.reply else 0,
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
        n_said = self.reply.n_tokens if self.reply else 0
        return Timings(
            queue_s=self.started - self.submitted,
            prefill_s=prefill_s,
            decode_s=decode_s,
            prefill_tps=n_read / prefill_s if prefill_s else 0.0,
            decode_tps=max(0, n_said - 1) / decode_s if decode_s else 0.0,
        )
