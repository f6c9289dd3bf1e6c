"""The chat in a real terminal: one that goes away, and signals that end the process."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.waiting import PATIENCE_S

pty = pytest.importorskip("pty")
termios = pytest.importorskip("termios")

# What the chat switches on, off again: without one of these a shell cannot be used.
SWITCHED_OFF = {
    "alternate screen": b"\x1b[?1049l",
    "mouse clicks": b"\x1b[?1000l",
    "mouse moves": b"\x1b[?1003l",
    "bracketed paste": b"\x1b[?2004l",
    "hidden cursor": b"\x1b[?25h",
    "focus reports": b"\x1b[?1004l",
    "kitty's keys": b"\x1b[<u",
}
HANGING = """
import os, time
from nanorun.tui.app import NanorunApp
from tests.support.fakes import FakeClient

class Hanging(FakeClient):
    async def start(self):
        os.write(1, b"it hangs")
        time.sleep(50)

NanorunApp(Hanging()).run()
"""


class Terminal:
    """A terminal of 80 columns, and the process that has it."""

    def __init__(self, *command: str) -> None:
        self.ours, self.theirs = pty.openpty()
        self.before = termios.tcgetattr(self.theirs)
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=self.theirs, stdout=self.theirs, stderr=self.theirs, start_new_session=True,
            cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        )  # fmt: skip
        self.seen = b""

    def read(self, timeout_s: float = 1.0) -> bool:
        """Take what was written; False if that is nothing."""
        if not select.select([self.ours], [], [], timeout_s)[0]:
            return False
        self.seen += os.read(self.ours, 65536)
        return True

    def wait_for(self, text: bytes) -> None:
        deadline = time.monotonic() + 120
        while text not in self.seen and time.monotonic() < deadline:
            self.read()
        assert text in self.seen

    def wait_for_end(self) -> int:
        """Its exit code, once it has ended and all it wrote is read."""
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            self.read(0.1)
        n_before = len(self.seen)
        hangs = self.process.poll() is None
        if hangs:
            self.process.send_signal(signal.SIGABRT)  # Python tells where each thread stands
            self.read()
        while self.read(0.1):
            pass
        assert not hangs, self.seen[n_before:].decode(errors="replace")
        return self.process.wait()

    def assert_usable(self) -> None:
        assert termios.tcgetattr(self.theirs) == self.before
        missing = [name for name, code in SWITCHED_OFF.items() if code not in self.seen]
        assert missing == []


@contextmanager
def terminal(*command: str) -> Iterator[Terminal]:
    opened = Terminal(*command)
    try:
        yield opened
    finally:
        opened.process.kill()
        opened.process.wait()
        os.close(opened.ours)
        os.close(opened.theirs)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGQUIT"])
def test_signal_leaves_a_terminal_that_can_be_used(pico_gguf: Path, name: str) -> None:
    with terminal("-m", "nanorun", "chat", str(pico_gguf), "--no-state") as chat:
        chat.wait_for(b"Ask something")
        chat.process.send_signal(getattr(signal, name))
        assert chat.wait_for_end() == 128 + getattr(signal, name)
        chat.assert_usable()


def test_signal_keeps_the_conversation(pico_gguf: Path) -> None:
    states = Path(os.environ["NANORUN_CACHE_DIR"]) / "states"
    with terminal("-m", "nanorun", "chat", str(pico_gguf), "--think", "off") as chat:
        chat.wait_for(b"Ask something")
        # Pasted; a shorter conversation is not worth a file.
        question = b"Remember: fox=1234, owl=4321. " * 40
        os.write(chat.ours, b"\x1b[200~" + question + b"\x1b[201~\r")
        chat.wait_for(b"t/s")
        chat.process.send_signal(signal.SIGTERM)
        assert chat.wait_for_end() == 128 + signal.SIGTERM
    assert list(states.iterdir())


def test_second_signal_does_not_wait_for_an_app_that_hangs() -> None:
    with terminal("-c", HANGING) as chat:
        chat.wait_for(b"it hangs")
        chat.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert chat.process.poll() is None
        chat.process.send_signal(signal.SIGTERM)
        assert chat.wait_for_end() == 128 + signal.SIGTERM
        chat.assert_usable()


def test_hangup_that_is_ignored_stays_ignored(pico_gguf: Path) -> None:
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
        f"os.execv(sys.executable, [sys.executable, '-m', 'nanorun', 'chat', {str(pico_gguf)!r}])"
    )
    with terminal("-c", ignoring) as chat:
        chat.wait_for(b"Ask something")
        chat.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert chat.process.poll() is None
        chat.process.send_signal(signal.SIGTERM)
        assert chat.wait_for_end() == 128 + signal.SIGTERM


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
