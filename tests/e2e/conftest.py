"""Endpoints on real sockets."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn

from nanorun.server.app import create_app
from nanorun.server.listen import bind, serve, url_of
from nanorun.server.settings import ServerSettings
from tests.support.fakes import FakeClient
from tests.support.waiting import PATIENCE_S

FAKE = Path(__file__).parent.parent / "support" / "fake_nanorun.py"


@dataclass
class Live:
    """An endpoint that listens."""

    client: FakeClient
    url: str
    stop: Callable[[], None]


@contextmanager
def _listening(client: FakeClient, settings: ServerSettings) -> Iterator[Live]:
    """A uvicorn in a thread of its own, stopped at the end."""
    listener = bind(settings.host, 0)
    url = url_of(listener)
    servers: list[uvicorn.Server] = []
    app = create_app(client, model_name="pico", settings=settings)
    ready = threading.Event()

    def on_ready(server: uvicorn.Server) -> None:
        servers.append(server)
        ready.set()

    work = serve(app, listener, settings, on_ready)
    thread = threading.Thread(target=asyncio.run, args=(work,))
    thread.start()

    def stop() -> None:
        servers[0].should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()

    assert ready.wait(PATIENCE_S)
    try:
        yield Live(client, url, stop)
    finally:
        stop()


@pytest.fixture
def live() -> Iterator[Callable[..., Live]]:
    """Starts endpoints over fake clients; they stop with the test."""
    with ExitStack() as stack:

        def start(*scripts: object, **settings: object) -> Live:
            client = FakeClient.playing(*scripts)  # type: ignore[arg-type]
            listening = _listening(client, ServerSettings(drain_s=1, **settings))  # type: ignore[arg-type]
            return stack.enter_context(listening)

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
