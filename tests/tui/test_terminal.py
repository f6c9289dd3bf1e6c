"""The chat in a terminal that goes away."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

pty = pytest.importorskip("pty")


def test_chat_ends_with_its_terminal_even_without_a_signal(pico_gguf: Path) -> None:
    """Without a controlling terminal there is no hang-up signal, as below `make`."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "nanorun", "chat", str(pico_gguf), "--no-state"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    try:
        screen, deadline = b"", time.monotonic() + 60
        while b"Ask something" not in screen and time.monotonic() < deadline:
            if select.select([ours], [], [], 1)[0]:
                screen += os.read(ours, 65536)
        assert b"Ask something" in screen
        os.close(ours)
        process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
