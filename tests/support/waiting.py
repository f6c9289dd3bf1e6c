"""Waiting for what must happen, on a machine of any speed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE_S = 120.0
"""Until what must happen is given up; nothing that works comes near it, on the busiest machine."""
_LOOK_EVERY_S = 0.02


def wait_until(holds: Callable[[], Any]) -> None:
    """Look again and again until something holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(_LOOK_EVERY_S)


async def become(holds: Callable[[], Any]) -> None:
    """Let the event loop run until something holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(_LOOK_EVERY_S)


@contextmanager
def little_work(cpu_s: float) -> Iterator[None]:
    """Hold the body to some seconds of CPU time of this process, whatever else runs."""
    started = time.process_time()
    yield
    spent = time.process_time() - started
    assert spent < cpu_s, f"took {spent:.1f} s of CPU time"
