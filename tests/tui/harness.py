"""A chat in a headless terminal, with a client that plays scripts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from textual.pilot import Pilot
from textual.worker import WorkerCancelled

from nanorun.model.chat import GenerateOptions, ModelInfo
from nanorun.runtime.protocol import Client
from nanorun.tui.app import NanorunApp
from nanorun.tui.screens.chat import ChatScreen
from nanorun.tui.widgets.turn import Turn
from tests.support.fakes import FakeClient
from tests.support.waiting import become


@dataclass
class SlowLoadingClient(FakeClient):
    """A client whose model is loaded when the test says so."""

    loaded: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> ModelInfo:
        self.n_starts += 1
        await self.loaded.wait()
        if self.start_error is not None:
            raise self.start_error
        return self.model_info


class Chat:
    """The application in a test: what a person does, and what is to be seen."""

    def __init__(self, app: NanorunApp, pilot: Pilot[None], notes: list[str]) -> None:
        self.app = app
        self.pilot = pilot
        self.notes = notes
        """Texts of the pop-up notifications."""

    @property
    def screen(self) -> ChatScreen:
        assert isinstance(self.app.screen, ChatScreen)
        return self.app.screen

    @property
    def turn(self) -> Turn:
        """The latest turn."""
        return self.screen.transcript.turns[-1]

    @property
    def state(self) -> str:
        return self.screen.status.state

    @property
    def text(self) -> str:
        """All that the terminal shows."""
        strips = self.app.screen._compositor.render_strips()
        return "\n".join(strip.text.rstrip() for strip in strips)

    @property
    def history(self) -> list[tuple[str, str]]:
        return [(message.role, message.content) for message in self.screen.messages]

    async def type(self, text: str) -> None:
        self.screen.composer.focus()
        self.screen.composer.insert(text)

    async def send(self, text: str) -> None:
        """Ask, and do not wait for the answer."""
        await self.type(text)
        await self.pilot.press("enter")

    async def ask(self, text: str) -> Turn:
        """Ask, and wait until the reply has ended."""
        await self.send(text)
        await self.settle()
        return self.turn

    async def settle(self) -> None:
        """Wait until no worker runs and all messages are handled."""
        for worker in list(self.app.workers):
            try:
                await worker.wait()
            except WorkerCancelled:
                continue
        await self.until(lambda: self.screen.turn is None)
        await self.pilot.pause()

    async def until(self, holds: Callable[[], Any]) -> None:
        """Let the app run until something holds.

        `Pilot.pause` waits for an idle processor, which a stream of tokens never leaves.
        """
        await become(holds)


@asynccontextmanager
async def chatting(
    client: Client,
    *,
    size: tuple[int, int] = (100, 30),
    options: GenerateOptions | None = None,
    model_name: str = "",
    endpoint: str = "",
    memory: Callable[[], str | None] = lambda: None,
) -> AsyncIterator[Chat]:
    """The chat with a client, started and ready (or as ready as the client gets)."""
    app = NanorunApp(
        client, model_name=model_name, options=options, endpoint=endpoint, memory=memory
    )
    notes: list[str] = []
    notify = app.notify

    def note(message: str, **options: Any) -> None:
        notes.append(message)
        notify(message, **options)

    app.notify = note  # type: ignore[method-assign]
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        yield Chat(app, pilot, notes)
