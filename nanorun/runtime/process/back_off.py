"""How long to wait before what failed is tried again."""

from __future__ import annotations

import time
from collections.abc import Callable

_FIRST_WAIT_S = 5.0
_LONGEST_WAIT_S = 300.0
# A failure so long ago has nothing to do with the next one.
_FORGOTTEN_AFTER_S = 600.0


class BackOff:
    """Twice as long with each failure after the first, which costs no wait.

    Args:
        clock: Seconds, as `time.monotonic`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = 0.0
        self.n_failures = 0
        """Of those that followed each other."""

    def failed(self) -> None:
        """Note a failure."""
        now = self._clock()
        if now - self._last > _FORGOTTEN_AFTER_S:
            self.n_failures = 0
        self._last = now
        self.n_failures += 1

    def wait_s(self) -> float:
        """Seconds until the next try; 0 if it may be made now."""
        if self.n_failures < 2:
            return 0.0
        # Past 2**10 the longest wait is reached, and floats would end at 2**1024.
        wait_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(10, self.n_failures - 2))
        return max(0.0, self._last + wait_s - self._clock())
