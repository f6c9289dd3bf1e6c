"""Signals that end a process, received while an app has the terminal.

By default they end it on the spot, and leave the person with a terminal in the alternate screen,
without a cursor, that reports the mouse and echoes nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

_ENDING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)
)
# What Textual's driver switches on, off again: paste and mouse reports, kitty's keys, the alternate
# screen, a hidden cursor, focus reports, lines that do not wrap.
_LEAVE_APP = (
    b"\x1b[?2004l\x1b[?7h\x1b[?2048l\x1b[?1000l\x1b[?1003l\x1b[?1015l\x1b[?1006l\x1b[?1016l"
    b"\x1b[<u\x1b[?1049l\x1b[?25h\x1b[?1004l"
)


@contextmanager
def leaving_on_signals(leave: Callable[[int], object]) -> Iterator[None]:
    """Leave an app in order when a signal asks the process to end; a second one leaves at once.

    To be used where the event loop runs. A signal that the process was started to ignore (nohup)
    stays ignored.

    Args:
        leave: Called in the event loop with the exit code that tells of the signal, once.
    """
    loop = asyncio.get_running_loop()
    restore_terminal = _terminal_restorer()
    is_leaving = False

    def receive(signum: int, _frame: FrameType | None) -> None:
        nonlocal is_leaving
        if is_leaving:
            restore_terminal()
            os._exit(128 + signum)
        is_leaving = True
        loop.call_soon_threadsafe(leave, 128 + signum)

    with ExitStack() as stack:
        for signum in _ENDING:
            previous = signal.getsignal(signum)
            if previous is not signal.SIG_IGN:
                # Not `loop.add_signal_handler`: that would wait for a loop that hangs.
                signal.signal(signum, receive)
                stack.callback(signal.signal, signum, previous)
        yield


def _terminal_restorer() -> Callable[[], None]:
    """What brings the terminal back to how it is now, whatever the app is doing."""
    if os.name != "posix":
        return lambda: None
    import termios

    try:
        before = termios.tcgetattr(0)
    except termios.error:  # no terminal: tests, pipes
        return lambda: None

    def restore() -> None:
        with suppress(OSError, termios.error):
            if termios.tcgetattr(0) == before:
                return  # the app has left it already
            termios.tcsetattr(0, termios.TCSANOW, before)
            assert sys.__stderr__ is not None  # where Textual writes
            os.write(sys.__stderr__.fileno(), _LEAVE_APP)

    return restore
