"""/v1/messages: Anthropic's way to ask."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanorun.server.anthropic.messages_body import MessagesRequest
from nanorun.server.anthropic.messages_writer import MessagesWriter
from nanorun.server.service import Service


def messages_routes(service: Service) -> APIRouter:
    """The routes of Anthropic's API."""
    router = APIRouter()

    @router.post("/v1/messages", response_model=None)
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation, whole or as a stream."""
        service.check_model(body.model)
        asked = body.to_asked(default_think=service.settings.think)
        writer = MessagesWriter(service.names.name, asked, shows_thinking=body.shows_thinking)
        return await service.respond(request, asked, writer, stream=bool(body.stream))

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(body: MessagesRequest) -> dict[str, int]:
        """How many tokens the prompt of a message has."""
        service.check_model(body.model)
        asked = body.to_asked(default_think=service.settings.think)
        n_tokens = await service.client.count_tokens(asked.prompt, asked.options)
        return {"input_tokens": n_tokens}

    @router.get("/api/hello", include_in_schema=False)
    async def say_hello() -> Response:
        """Answer Claude Code's look whether somebody is here."""
        return Response()

    return router
