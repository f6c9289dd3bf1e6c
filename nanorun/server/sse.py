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


def encode(payload: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event, with a line that names it where the API has one."""
    body = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    line = f"event: {name}\n" if name else ""
    return f"{line}data: {body}\n\n".encode()


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


async def with_pauses(events: AsyncIterator[T], pause_s: float) -> AsyncGenerator[T | None, None]:
    """The events, and None whenever none came for a while.

    Waiting is done beside the iterator: a time limit on the iterator itself would cancel it.
    """
    pending: asyncio.Future[T] | None = None
    try:
        while True:
            pending = asyncio.ensure_future(_next(events))
            while not (await asyncio.wait({pending}, timeout=pause_s))[0]:
                yield None
            try:
                event = pending.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        if pending is not None:
            await _end(pending)


async def _next(events: AsyncIterator[T]) -> T:
    return await anext(events)
