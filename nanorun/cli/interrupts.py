"""Ctrl-C in two steps: the first asks the work to stop, the second ends the process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, TypeVar

from nanorun.errors import ExitCode

T = TypeVar("T")


class Interrupts:
    """Receives Ctrl-C while asynchronous work runs.

    The first one calls `on_first` in the event loop; by default that cancels the work. The second
    one leaves at once: the engine's process sees its pipe close and ends too.
    """

    def __init__(self) -> None:
        self.count = 0
        self.on_first: Callable[[], object] = self.cancel
        self._task: asyncio.Task[Any] | None = None
        self._action: object = None

    def cancel(self) -> None:
        """End the work where it is."""
        if self._task is not None:
            self._task.cancel()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run the work to its end.

        Raises:
            KeyboardInterrupt: If Ctrl-C cancelled it.
        """
        previous = signal.getsignal(signal.SIGINT)
        try:
            return asyncio.run(self._watch(work))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            signal.signal(signal.SIGINT, previous)

    async def _watch(self, work: Coroutine[Any, Any, T]) -> T:
        loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()

        def receive(_signum: int, _frame: FrameType | None) -> None:
            self.count += 1
            if self.count > 1:
                os._exit(ExitCode.INTERRUPTED)
            loop.call_soon_threadsafe(self._act)

        # Not `loop.add_signal_handler`: that would wait for a loop that hangs in a callback.
        signal.signal(signal.SIGINT, receive)
        return await work

    def _act(self) -> None:
        # Kept, because the loop itself does not keep a task that `on_first` may have made.
        self._action = self.on_first()
