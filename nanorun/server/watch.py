"""Follows each request from its first byte to its last, refused ones included."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanorun.server.record import RequestRecord, record_of


class Watch:
    """Keeps the record of each request, and hands it on when the request has ended.

    Args:
        app: What answers.
        on_end: Each is told of every request that has ended.
    """

    def __init__(self, app: ASGIApp, on_end: Sequence[Callable[[RequestRecord], None]]) -> None:
        self._app = app
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = record_of(scope)

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            record.ended = time.monotonic()
            for tell in self._on_end:
                tell(record)
