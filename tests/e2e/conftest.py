"""Endpoints on real sockets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nanorun.server.settings import ServerSettings
from tests.support.fakes import FakeClient
from tests.support.listening import Live, listening

FAKE = Path(__file__).parent.parent / "support" / "fake_nanorun.py"


@pytest.fixture
def live() -> Iterator[Callable[..., Live]]:
    """Starts endpoints over fake clients; they stop with the test."""
    with ExitStack() as stack:

        def start(*scripts: Any, **settings: Any) -> Live:
            client = FakeClient.playing(*scripts)
            settled = ServerSettings(drain_s=1, **settings)
            return stack.enter_context(listening(client, settled))

        yield start


@dataclass
class ServeProcess:
    """`nanorun serve` as a process of its own."""

    process: subprocess.Popen[str]
    url: str
    greeting: str


@contextmanager
def serving(case: str, *args: str) -> Iterator[ServeProcess]:
    """`nanorun serve pico` over a fake client, from the moment it listens."""
    command = [sys.executable, str(FAKE), case, "serve", "pico", "--port", "0", *args]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            greeting = next(line for line in process.stderr if "http://" in line)
            url = next(word for word in greeting.split() if word.startswith("http://"))
            yield ServeProcess(process, url, greeting)
        finally:
            if process.poll() is None:
                process.kill()
