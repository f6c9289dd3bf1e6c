"""How many requests may be under way or wait, how long, and when to come back after a refusal."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nanorun.model.units import format_gib
from nanorun.server.errors import ApiError
from nanorun.server.settings import ServerSettings

_MAX_RETRY_S = 60
"""Clients of OpenAI and Anthropic heed no longer wait."""
_N_RECENT = 16


@dataclass(slots=True, eq=False)
class Place:
    """What one request takes up."""

    n_waiting: int
    """Answers of it that the engine has not begun."""
    n_bytes: int
    """Size of its body: a cheap measure of how much there is to read."""

    def begin(self) -> None:
        """Take down that the engine began one of its answers."""
        self.n_waiting -= 1


class Admission:
    """Counts requests; the engine itself queues those beyond `n_parallel`."""

    def __init__(self, settings: ServerSettings) -> None:
        self.n_active = 0
        """Answers that are made or wait."""
        self._settings = settings
        self._places: set[Place] = set()
        self._n_by_key: Counter[str] = Counter()
        self._pace = _Pace()

    @property
    def n_waiting(self) -> int:
        """Answers that the engine has not begun."""
        return sum(place.n_waiting for place in self._places)

    def check(self, n: int = 1, *, key: str | None = None, n_bytes: int = 0) -> None:
        """Refuse a request beyond a limit; a large one only if others are before it.

        Args:
            n: Answers it wants.
            key: The name of its key.
            n_bytes: Size of its body.

        Raises:
            ApiError: 429 that names the limit, with a guess at when there is room again.
        """
        n_parallel, max_queued = self._settings.n_parallel, self._settings.max_queued
        n_most = n_parallel + max_queued
        if self.n_active and self.n_active + n > n_most:
            raise self._refusal(
                f"{self.n_active} requests are being answered or waiting, and no more than"
                f" {n_most} may (--parallel {n_parallel}, --max-queued {max_queued})",
                "queue_full",
            )
        self._check_bytes(n_bytes)
        if key is not None:
            self._check_key(n, key)

    def _check_bytes(self, n_bytes: int) -> None:
        n_before = sum(place.n_bytes for place in self._places if place.n_waiting)
        n_most = self._settings.max_queued_bytes
        if n_before and n_before + n_bytes > n_most:
            raise self._refusal(
                f"the bodies of waiting requests make {format_gib(n_before)}, this one"
                f" {format_gib(n_bytes)}, and together they may make {format_gib(n_most)}"
                " (--max-queued-size)",
                "queue_full",
            )

    def _check_key(self, n: int, key: str) -> None:
        n_now, n_most = self._n_by_key[key], self._settings.max_per_key
        if n_most is None or not n_now or n_now + n <= n_most:
            return
        raise self._refusal(
            f"{n_now} requests of the key {key!r} are under way, and no more than {n_most} of one"
            f" key may be (--max-per-key {n_most})",
            "key_limit",
            # Of all requests that end, only its own make room for it.
            one_in=self.n_active / n_now,
        )

    def waited_too_long(self) -> ApiError:
        """What a request is told that has waited for as long as any may."""
        limit_s = self._settings.max_wait_s
        return self._refusal(
            f"the request has waited {limit_s:g} s for its turn, and none may wait longer"
            " (--max-wait)",
            "waited_too_long",
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
    def place(self, n: int = 1, *, key: str | None = None, n_bytes: int = 0) -> Iterator[Place]:
        """Hold a place for each of `n` answers for the time of a `with` block.

        Raises:
            ApiError: As `check`.
        """
        self.check(n, key=key, n_bytes=n_bytes)
        place = Place(n, n_bytes)
        self._change(n, key)
        self._places.add(place)
        try:
            yield place
        finally:
            self._places.remove(place)
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
