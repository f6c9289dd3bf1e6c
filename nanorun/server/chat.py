"""/v1/chat/completions: from a request to the engine and back, whole or as a stream."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from nanorun.chat.schema.following import SchemaCheck, checked
from nanorun.model.chat import (
    Event,
    Finished,
    GenerateOptions,
    Message,
    Notice,
    PrefillProgress,
    TokenLogprobs,
    ToolArguments,
    ToolCallBegun,
)
from nanorun.runtime.protocol import Client, Generation
from nanorun.server import sse
from nanorun.server.admission import Admission
from nanorun.server.errors import ApiError, to_api_error
from nanorun.server.replies import Reply
from nanorun.server.schema import ChatRequest, ControlRequest
from nanorun.server.settings import ServerSettings

log = logging.getLogger(__name__)

_CLIENT_CLOSED_REQUEST = 499


class ChatEndpoint:
    """Answers conversations.

    Args:
        client: What generates.
        model_name: The model's name towards clients.
        settings: Limits and defaults.
    """

    def __init__(self, client: Client, model_name: str, settings: ServerSettings) -> None:
        self._client = client
        self._model_name = model_name
        self._settings = settings
        self.admission = Admission(settings.n_parallel, settings.max_queued)
        self._streams: dict[str, Generation] = {}
        """Replies that stream now, by the id their chunks carry."""

    async def answer(self, body: ChatRequest, request: Request) -> Response:
        """The response to a request that has been parsed.

        Raises:
            ApiError: If it is refused.
            NanorunError: If it fails before the response has begun.
        """
        body.check_supported()
        self._check_model(body.model)
        messages = body.to_messages()
        options = body.to_options(default_think=self._settings.think)
        try:
            if body.stream:
                chunks = self._chunks(messages, options, include_usage=body.wants_usage)
                # Up to the first chunk a failure can still have an HTTP status of its own.
                first = await sse.while_connected(request.receive, _first(chunks))
                return sse.EventStream(first, chunks)
            work = self._completion(messages, options)
            return JSONResponse(await sse.while_connected(request.receive, work))
        except ClientDisconnect:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)

    async def control(self, body: ControlRequest) -> dict[str, Any]:
        """Change how long a reply thinks while it streams, as llama.cpp's server lets one do.

        Raises:
            ApiError: If it lacks the budget it is about.
        """
        budget = body.reasoning_budget
        if body.action == "reasoning_budget" and budget is None:
            message = "reasoning_budget must say how many tokens"
            raise ApiError(400, message, code="invalid_value", param="reasoning_budget")
        generation = self._streams.get(body.id)
        if generation is None:
            return {"success": False, "message": "no reply with this id streams now"}
        if body.action == "reasoning_end":
            await generation.finish_thinking()
        else:
            await generation.set_budget(None if budget is None or budget < 0 else budget)
        return {"success": True}

    def _check_model(self, asked: str | None) -> None:
        info = self._client.info
        known = {self._model_name, info.name if info else self._model_name}
        if asked is not None and asked not in known:
            message = f"there is no model {asked!r} here; this endpoint serves {self._model_name!r}"
            raise ApiError(404, message, code="model_not_found", param="model")

    async def _completion(
        self, messages: Sequence[Message], options: GenerateOptions
    ) -> dict[str, Any]:
        reply = Reply(self._model_name)
        with self.admission.place():
            async with aclosing(self._client.generate(messages, options)) as generation:
                async for event in checked(generation, SchemaCheck(options)):
                    _log_notice(event)
                    if event is not None:
                        reply.take(event)
        return reply.completion()

    async def _chunks(
        self, messages: Sequence[Message], options: GenerateOptions, *, include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        """The stream's bytes. What fails after its first chunk becomes an event of the stream."""
        reply = Reply(self._model_name)
        pause_s = self._settings.keepalive_s
        check = SchemaCheck(options)
        has_begun = False
        with self.admission.place():
            try:
                async with (
                    aclosing(self._client.generate(messages, options)) as generation,
                    aclosing(sse.with_pauses(checked(generation, check), pause_s)) as events,
                ):
                    self._streams[reply.id] = generation
                    async for event in events:
                        _log_notice(event)
                        if not has_begun:
                            has_begun = True
                            yield sse.encode(reply.opening())
                        for chunk in _encode_event(reply, event, include_usage):
                            yield chunk
            except Exception as error:
                if not has_begun:
                    raise
                yield sse.encode(to_api_error(error).body())
            finally:
                self._streams.pop(reply.id, None)


async def _first(chunks: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(chunks)


def _log_notice(event: Event | None) -> None:
    """Tell whoever runs the server what a client may not show: a model opened smaller."""
    if isinstance(event, Notice):
        log.warning("%s", event.text)


def _encode_event(reply: Reply, event: Event | None, include_usage: bool) -> list[bytes]:
    """The bytes that tell a client of an event; comments where there is no chunk for it."""
    if event is None:
        return [sse.comment("waiting")]
    reply.take(event)
    match event:
        case PrefillProgress(n_done=n_done, n_total=n_total):
            return [sse.comment(f"prompt {n_done} of {n_total} tokens")]
        case TokenLogprobs() | ToolCallBegun() | ToolArguments():
            return []
        case Notice(text):
            return [sse.comment(f"notice: {text}")]
        case Finished():
            last = [sse.encode(reply.chunk(event))]
            if include_usage:
                last.append(sse.encode(reply.usage_chunk(event)))
            return [*last, sse.DONE]
        case _:
            return [sse.encode(reply.chunk(event))]
