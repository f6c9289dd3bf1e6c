"""A request on its way through the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from nanorun.model.chat import PrefillProgress, Timings, Usage
from nanorun.runtime.prefix_tree import Branch
from nanorun.runtime.request import Request
from nanorun.runtime.sampling import Sampler


@dataclass(eq=False, slots=True)
class Stream:
    """A request, the sequence it runs in, and how far it is."""

    request: Request
    submitted: float = field(default_factory=time.monotonic)
    branch: Branch | None = None
    sampler: Sampler | None = None
    pending: int | None = None
    """The last picked token, not yet evaluated."""
    stops: set[int] = field(default_factory=set)
    """Prompt positions where prefill pauses, for a checkpoint or another request's fork."""
    n_completion: int = 0
    cancelled: bool = False
    started: float = 0.0
    first_token: float = 0.0

    @property
    def n_evaluated(self) -> int:
        """Tokens of this stream that the engine has read."""
        return self.branch.n_tokens if self.branch else 0

    @property
    def in_prefill(self) -> bool:
        """Whether prompt tokens are left to evaluate."""
        return self.n_evaluated < len(self.request.prompt)

    def progress(self) -> PrefillProgress:
        """How far the prompt is read."""
        n_total = len(self.request.prompt)
        n_cached = self.branch.n_cached if self.branch else 0
        return PrefillProgress(min(self.n_evaluated, n_total), n_total, n_cached)

    def usage(self) -> Usage:
        """Tokens so far."""
        branch = self.branch
        return Usage(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=branch.n_cached if branch else 0,
            cached_from=branch.cached_from if branch and branch.n_cached else None,
            thinking_tokens=self.request.dial.n_thinking,
            completion_tokens=self.n_completion,
        )

    def timings(self) -> Timings:
        """Where the time went so far."""
        now = time.monotonic()
        if self.branch is None:
            return Timings(queue_s=now - self.submitted)
        prefill_s = (self.first_token or now) - self.started
        decode_s = now - self.first_token if self.first_token else 0.0
        n_read = min(self.n_evaluated, len(self.request.prompt)) - self.branch.n_cached
        return Timings(
            queue_s=self.started - self.submitted,
            prefill_s=prefill_s,
            decode_s=decode_s,
            prefill_tps=n_read / prefill_s if prefill_s else 0.0,
            decode_tps=max(0, self.n_completion - 1) / decode_s if decode_s else 0.0,
        )
