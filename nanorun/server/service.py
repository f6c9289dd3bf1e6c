"""The one way from a request to the engine and back, for every API.

A dialect turns its body into an `Asked` and brings a `Writer`; everything between is here:
whether there is a place, the checks of schemas, several answers side by side, silence, failures
before and after a stream has begun, and a client that leaves.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from nanorun.chat.schema.following import SchemaCheck, checked
from nanorun.model.chat import Event, ModelInfo, Notice
from nanorun.runtime.protocol import Generation, TextClient
from nanorun.server import sse
from nanorun.server.admission import Admission, Place
from nanorun.server.asked import Asked
from nanorun.server.beginning import begun_within
from nanorun.server.errors import ApiError, to_api_error
from nanorun.server.merging import merged
from nanorun.server.model_names import ModelNames
from nanorun.server.record import AnswerRecord, RequestRecord, record_of
from nanorun.server.settings import ServerSettings
from nanorun.server.writer import Writer

log = logging.getLogger(__name__)

_CLIENT_CLOSED_REQUEST = 499


class Service:
    """What the routes of every API share.

    Args:
        client: What generates.
        names: What clients may call the model.
        settings: Limits and defaults.
    """

    def __init__(self, client: TextClient, names: ModelNames, settings: ServerSettings) -> None:
        self.client = client
        self.names = names
        self.settings = settings
        self.admission = Admission(settings)
        self.streams: dict[str, list[Generation]] = {}
        """The answers of replies that are made now, by the reply's id."""
        self.under_way: dict[str, RequestRecord] = {}
        """Requests that are answered now or wait, by their id."""

    def info(self) -> ModelInfo:
        """What answers.

        Raises:
            ApiError: 503 while there is no model.
        """
        if self.client.info is None:
            raise ApiError(503, "the model is not loaded", type="server_error", code="not_ready")
        return self.client.info

    def check_model(self, asked: str | None) -> None:
        """Refuse the name of a model that is not here.

        Raises:
            ApiError: 404.
        """
        if self.client.info is not None:
            self.names.add(self.client.info.name)
        self.names.check(asked)

    async def respond(
        self, request: Request, asked: Asked, writer: Writer, *, stream: bool
    ) -> Response:
        """The response to a request that has been understood.

        Raises:
            ApiError: If it is refused.
            NanorunError: If it fails before the response has begun.
        """
        record = record_of(request.scope)
        for notice in asked.notices:
            log.info("%s", notice)
        try:
            if stream:
                pieces = self._pieces(asked, writer, record)
                # Up to the first piece a failure can still have an HTTP status of its own.
                first = await sse.while_connected(request.receive, _first(pieces))
                return sse.EventStream(first, pieces, writer.media_type)
            return JSONResponse(
                await sse.while_connected(request.receive, self.complete(asked, writer, record))
            )
        except ClientDisconnect:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)

    async def complete(
        self, asked: Asked, writer: Writer, record: RequestRecord
    ) -> dict[str, object]:
        """The whole reply, written down once it is there.

        Raises:
            ApiError: If there is no place for it.
            NanorunError: If it fails.
        """
        async with aclosing(self._events(asked, writer, record)) as events:
            async for i_choice, event in events:
                if event is not None:
                    writer.take(i_choice, event)
        await writer.settle()
        return writer.whole()

    async def _pieces(
        self, asked: Asked, writer: Writer, record: RequestRecord
    ) -> AsyncGenerator[bytes, None]:
        """A stream's bytes. What fails after its first ones becomes a part of the stream."""
        has_begun = False
        try:
            async with (
                aclosing(self._events(asked, writer, record)) as all_events,
                aclosing(sse.gathered(all_events, self.settings.keepalive_s)) as gatherings,
            ):
                async for gathering in gatherings:
                    opening = b"" if has_begun else b"".join(writer.opening())
                    piece = opening + _written(writer, gathering)
                    if piece:
                        has_begun = True
                        yield piece
            await writer.settle()
            yield b"".join(writer.closing())
        except Exception as error:
            if not has_begun:
                raise
            told = to_api_error(error)
            record.failure = told.code or told.type
            yield b"".join(writer.failure(told))

    async def _events(
        self, asked: Asked, writer: Writer, record: RequestRecord
    ) -> AsyncGenerator[tuple[int, Event | None], None]:
        """The events of all answers with the index of theirs, while a place is held."""
        admission = self.admission
        with admission.place(asked.n_answers, key=record.key, n_bytes=record.n_body_bytes) as place:
            async with AsyncExitStack() as stack:
                generations: list[Generation] = []
                answers: list[AsyncIterator[Event | None]] = []
                for prompt, options in asked.answers():
                    generation = self.client.generate(prompt, options)
                    await stack.enter_async_context(aclosing(generation))
                    generations.append(generation)
                    answer = checked(generation, SchemaCheck(options))
                    await stack.enter_async_context(aclosing(answer))
                    answer = self._in_time(answer, place)
                    answers.append(await stack.enter_async_context(aclosing(answer)))
                stack.enter_context(self._shown(record, writer, generations))
                events = await stack.enter_async_context(aclosing(merged(answers)))
                async for i_choice, event in events:
                    if event is not None:
                        record.answers[i_choice].take(event)
                        _log_notice(event)
                    yield i_choice, event

    @contextmanager
    def _shown(
        self, record: RequestRecord, writer: Writer, generations: list[Generation]
    ) -> Iterator[None]:
        """Let a reply be seen and controlled while it is made."""
        record.model, record.reply_id = self.names.name, writer.id
        record.answers = [AnswerRecord() for _ in generations]
        self.under_way[record.id] = record
        self.streams[writer.id] = generations
        try:
            yield
        finally:
            del self.streams[writer.id], self.under_way[record.id]

    def _in_time(
        self, answer: AsyncIterator[Event | None], place: Place
    ) -> AsyncGenerator[Event | None, None]:
        """The events of an answer, or a refusal if the engine does not begin it soon enough."""
        return begun_within(
            answer,
            self.settings.max_wait_s,
            on_begin=place.begin,
            too_late=self.admission.waited_too_long,
        )


def _written(writer: Writer, gathering: Sequence[tuple[int, Event | None]]) -> bytes:
    """What a stream says of events that came together; of none, that it goes on."""
    pieces: list[bytes] = []
    for i_choice, event in gathering or [(0, None)]:
        if event is None:
            pieces.append(writer.pause("waiting"))
        else:
            pieces += writer.write(i_choice, writer.take(i_choice, event))
    return b"".join(pieces)


async def _first(pieces: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(pieces)


def _log_notice(event: Event) -> None:
    """Tell whoever runs the server what a client may not show: a model opened smaller."""
    if isinstance(event, Notice):
        log.warning("%s", event.text)
