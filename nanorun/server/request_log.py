"""One line a request, without contents; and the contents, for whoever debugs and asks for them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanorun.server.record import RequestRecord, record_of

log = logging.getLogger(__name__)

_LOOKS = frozenset({"/", "/health", "/metrics", "/props", "/slots", "/v1/models", "/api/version"})
"""Asked every few seconds by whoever watches; told only where they fail, or with `--verbose`."""
_MOST_PATH_CHARS = 200
MOST_CONTENT_BYTES = 4096
"""What is shown of each body."""


def log_request(record: RequestRecord) -> None:
    """Write the line of a request that has ended."""
    is_look = record.path in _LOOKS and record.status == 200
    log.log(logging.DEBUG if is_look else logging.INFO, "%s", line_of(record))


def line_of(record: RequestRecord) -> str:
    """When, what, with which status, and `name=value` of what else is known."""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    path = quote(record.path[:_MOST_PATH_CHARS], safe="/:@!$&'()*+,;=~")
    status = "-" if record.status is None else record.status
    return " ".join((now, record.method, path, str(status), *_known(record)))


def _known(record: RequestRecord) -> Iterator[str]:
    if record.key is not None:
        yield f"key={record.key}"
    if record.answers:
        yield f"model={quote(record.model or '')}"
        yield from _tokens(record)
    if record.first_token_s is not None:
        yield f"first={_ms(record.first_token_s)}"
    yield f"total={_ms(record.age_s)}"
    if record.answers:
        ends = {a.finished.reason if a.finished else "abort" for a in record.answers}
        yield f"finish={','.join(sorted(ends))}"
    if record.failure is not None:
        yield f"error={record.failure}"
    yield f"id={record.id}"


def _tokens(record: RequestRecord) -> Iterator[str]:
    """Tokens of all answers together; of one that was cut off, as far as it came."""
    usages = [a.finished.usage if a.finished else None for a in record.answers]
    pairs = list(zip(record.answers, usages, strict=True))
    yield f"prompt={sum(u.prompt_tokens if u else a.n_prompt for a, u in pairs)}"
    yield f"cached={sum(u.cached_tokens if u else a.n_reused for a, u in pairs)}"
    yield f"generated={sum(a.n_generated for a in record.answers)}"


def _ms(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"


class ContentsLog:
    """Writes the beginnings of bodies, asked and answered, to the log.

    Args:
        app: What answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and write when it has ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked, answered = _Beginning(), _Beginning()

        async def receive_noted() -> Message:
            message = await receive()
            asked.take(message)
            return message

        async def send_noted(message: Message) -> None:
            answered.take(message)
            await send(message)

        try:
            await self._app(scope, receive_noted, send_noted)
        finally:
            for verb, body in (("asked", asked), ("answered", answered)):
                if body.n_bytes:
                    log.info("id=%s %s %s", record_of(scope).id, verb, body)


class _Beginning:
    """The first bytes of a body."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self._kept = bytearray()

    def take(self, message: Message) -> None:
        piece = message.get("body", b"")
        self.n_bytes += len(piece)
        self._kept += piece[: MOST_CONTENT_BYTES - len(self._kept)]

    def __str__(self) -> str:
        """As one line that no terminal takes for commands."""
        text = json.dumps(self._kept.decode("utf-8", "replace"), ensure_ascii=True)
        n_more = self.n_bytes - len(self._kept)
        return f"{text} and {n_more} bytes more" if n_more else text
