"""Server-sent events, and work that ends when nobody is left to read its result."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

MEDIA_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"

# nginx holds a stream back until its buffer is full unless told not to.
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

# Events that wait for a client to take those before them; then their maker waits.
_MOST_GATHERED = 256

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def encode(payload: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event, with a line that names it where the API has one."""
    line = f"event: {name}\n" if name else ""
    return f"{line}data: {_to_json(payload)}\n\n".encode()


def comment(text: str) -> bytes:
    """A line that keeps the connection alive and that clients skip."""
    return f": {' '.join(text.split())}\n\n".encode()


class EventStream(StreamingResponse):
    """A response that sends what a generator yields.

    The generator is closed when the client goes away, and always before the response ends, so its
    `finally` may release what it holds.

    Args:
        first: What the generator yielded already.
        rest: The generator.
        media_type: What it is.
    """

    def __init__(
        self, first: bytes, rest: AsyncGenerator[bytes, None], media_type: str = MEDIA_TYPE
    ) -> None:
        super().__init__(_chain(first, rest), media_type=media_type, headers=_HEADERS)
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            # Nobody is left to tell when the client is gone.
            with suppress(ClientDisconnect):
                await while_connected(receive, self.stream_response(send))
        finally:
            await self._rest.aclose()


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of work that is cancelled when the client disconnects.

    Args:
        receive: The request's channel; its body must have been read.
        work: What to do meanwhile.

    Raises:
        ClientDisconnect: If nobody is left to be answered.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _end(task)
        await _end(gone)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait until it has cleaned up; what it raises then interests nobody."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


async def gathered(events: AsyncIterator[T], pause_s: float) -> AsyncGenerator[list[T], None]:
    """The events that came since the last time, and an empty list whenever none came for a while.

    One task reads them as they come. So an event needs no task and no timer of its own, and those
    that come together leave together. A reader that is slower than the events is waited for.

    Args:
        events: What comes.
        pause_s: Seconds without an event after which there is an empty list.
    """
    ready: list[T] = []
    news, room = asyncio.Event(), asyncio.Event()

    async def read() -> None:
        try:
            async for event in events:
                ready.append(event)
                news.set()
                if len(ready) >= _MOST_GATHERED:
                    room.clear()
                    await room.wait()
        finally:
            news.set()

    reader = asyncio.ensure_future(read())
    try:
        while ready or not reader.done():
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await news.wait()
            taken = ready.copy()
            ready.clear()
            news.clear()
            room.set()
            if taken or not reader.done():
                yield taken
        reader.result()
    finally:
        await _end(reader)
