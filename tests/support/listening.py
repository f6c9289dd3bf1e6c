"""Endpoints on real sockets, each in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from nanorun.server.app import create_app
from nanorun.server.listen import bind, serve, url_of
from nanorun.server.settings import ServerSettings
from tests.support.fakes import FakeClient
from tests.support.waiting import PATIENCE_S


@dataclass
class Live:
    """An endpoint that listens."""

    client: FakeClient
    url: str
    stop: Callable[[], None]
    loop: asyncio.AbstractEventLoop
    """Where it answers: another thread's."""


@contextmanager
def listening(client: FakeClient, settings: ServerSettings) -> Iterator[Live]:
    """A uvicorn in a thread of its own, stopped at the end."""
    listener = bind(settings.host, 0)
    url = url_of(listener)
    begun: list[tuple[uvicorn.Server, asyncio.AbstractEventLoop]] = []
    app = create_app(client, model_name="pico", settings=settings)
    ready = threading.Event()

    def on_ready(server: uvicorn.Server) -> None:
        begun.append((server, asyncio.get_running_loop()))
        ready.set()

    work = serve(app, listener, settings, on_ready)
    thread = threading.Thread(target=asyncio.run, args=(work,))
    thread.start()

    def stop() -> None:
        begun[0][0].should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()

    assert ready.wait(PATIENCE_S)
    try:
        yield Live(client, url, stop, begun[0][1])
    finally:
        stop()
