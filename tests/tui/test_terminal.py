"""The chat in a terminal that goes away."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import PATIENCE_S

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
        screen = b""
        while b"Ask something" not in screen:
            assert select.select([ours], [], [], PATIENCE_S)[0], screen
            screen += os.read(ours, 65536)
        os.close(ours)
        process.wait(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
