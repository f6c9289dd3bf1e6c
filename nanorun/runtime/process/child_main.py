"""What every child process of nanorun does first and last."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import BinaryIO

_EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h


def run_as_child(serve: Callable[[BinaryIO, BinaryIO], None]) -> None:
    """Serve frames on the standard streams, then end the process.

    Native code may print to stdout; frames go out on a private copy of it, and what anyone else
    writes there joins stderr. Other threads may hold the locks of the streams, so the interpreter
    is not asked to clean up.
    """
    _die_with_parent()
    # Ctrl-C and a service manager's stop reach the whole process group. The parent decides: it may
    # still want to finish something, and closes stdin when it is done.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    source = os.fdopen(os.dup(0), "rb")
    try:
        serve(source, sink)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(_EXIT_BUG)
    os._exit(0)


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent dies, however it dies."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
