"""How many requests may be under way, and when to come back if there are too many."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from nanorun.server.errors import ApiError

_MAX_RETRY_S = 60
"""Clients of OpenAI and Anthropic heed no longer wait."""
_N_RECENT = 16


class Admission:
    """Counts requests; the engine itself queues those beyond `n_parallel`.

    Args:
        n_parallel: Requests the engine answers at the same time.
        max_queued: Requests that may wait beyond those.
        max_per_key: Requests of one key that may be under way; None for no limit.
    """

    def __init__(self, n_parallel: int, max_queued: int, *, max_per_key: int | None = None) -> None:
        self.n_active = 0
        self._n_parallel = n_parallel
        self._max_queued = max_queued
        self._max_per_key = max_per_key
        self._n_by_key: Counter[str] = Counter()
        self._pace = _Pace()

    def check(self, n: int = 1, *, key: str | None = None) -> None:
        """Refuse a request beyond a limit; one with several answers if nobody waits.

        Args:
            n: Answers it wants.
            key: The name of its key.

        Raises:
            ApiError: 429 that names the limit, with a guess at when there is room again.
        """
        n_most = self._n_parallel + self._max_queued
        if self.n_active and self.n_active + n > n_most:
            raise self._refusal(
                f"{self.n_active} requests are being answered or waiting, and no more than"
                f" {n_most} may (--parallel {self._n_parallel}, --max-queued {self._max_queued})",
                "queue_full",
            )
        if key is not None:
            self._check_key(n, key)

    def _check_key(self, n: int, key: str) -> None:
        n_now, n_most = self._n_by_key[key], self._max_per_key
        if n_most is None or not n_now or n_now + n <= n_most:
            return
        raise self._refusal(
            f"{n_now} requests of the key {key!r} are under way, and no more than {n_most} of one"
            f" key may be (--max-per-key {n_most})",
            "key_limit",
            # Of all requests that end, only its own make room for it.
            one_in=self.n_active / n_now,
        )

    def _refusal(self, problem: str, code: str, *, one_in: float = 1.0) -> ApiError:
        wait_s = min(_MAX_RETRY_S, max(1, math.ceil(self._pace.s_each() * one_in)))
        return ApiError(
            429,
            f"{problem}; try again in {wait_s} s",
            type="rate_limit_error",
            code=code,
            headers={"Retry-After": str(wait_s)},
        )

    @contextmanager
    def place(self, n: int = 1, *, key: str | None = None) -> Iterator[None]:
        """Hold a place for each of `n` answers for the time of a `with` block.

        Raises:
            ApiError: As `check`.
        """
        self.check(n, key=key)
        self._change(n, key)
        try:
            yield
        finally:
            self._change(-n, key)

    def _change(self, n: int, key: str | None) -> None:
        """Count answers that begin, or end if `n` is negative."""
        self._pace.note(is_busy=self.n_active > 0, n_ended=max(0, -n))
        self.n_active += n
        if key is not None:
            self._n_by_key[key] += n
            if not self._n_by_key[key]:
                del self._n_by_key[key]


class _Pace:
    """How fast requests end, as far as there are any."""

    def __init__(self) -> None:
        self._busy_s = 0.0
        """Time in which there were requests."""
        self._looked_at = time.monotonic()
        self._ends: deque[float] = deque([0.0], maxlen=_N_RECENT + 1)
        """Busy times at which the last ones ended, after the time from which they are counted."""

    def note(self, *, is_busy: bool, n_ended: int) -> None:
        """Take down what was since the last time, and answers that end now."""
        now = time.monotonic()
        if is_busy:
            self._busy_s += now - self._looked_at
        self._looked_at = now
        self._ends.extend([self._busy_s] * n_ended)

    def s_each(self) -> float:
        """Seconds from one end to the next, lately; called while there are requests."""
        busy_s = self._busy_s + time.monotonic() - self._looked_at
        return (busy_s - self._ends[0]) / max(1, len(self._ends) - 1)
