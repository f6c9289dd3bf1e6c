"""How many requests may be under way, and when to come back if there are too many."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nanorun.server.errors import ApiError

_MAX_RETRY_S = 60
# How much one finished request moves the estimate: about the last five count.
_WEIGHT = 0.2


class Admission:
    """Counts requests; the engine itself queues those beyond `n_parallel`."""

    def __init__(self, n_parallel: int, max_queued: int) -> None:
        self.n_active = 0
        self._n_parallel = n_parallel
        self._n_max = n_parallel + max_queued
        self._mean_s = 1.0

    def check(self, n: int = 1) -> None:
        """Refuse a request beyond the queue's length; one with several answers if nobody waits.

        Raises:
            ApiError: 429, with a guess at when a place will be free.
        """
        if self.n_active + n <= self._n_max or not self.n_active:
            return
        raise ApiError(
            429,
            f"{self.n_active} requests are being answered or waiting, and no more may",
            type="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(self._retry_after_s())},
        )

    def _retry_after_s(self) -> int:
        """A place is free when one of `n_parallel` ends."""
        return min(_MAX_RETRY_S, max(1, math.ceil(self._mean_s / self._n_parallel)))

    @contextmanager
    def place(self, n: int = 1) -> Iterator[None]:
        """Hold a place for each of `n` answers for the time of a `with` block.

        Raises:
            ApiError: As `check`.
        """
        self.check(n)
        started = time.monotonic()
        self.n_active += n
        try:
            yield
        finally:
            self.n_active -= n
            self._mean_s += _WEIGHT * (time.monotonic() - started - self._mean_s)
