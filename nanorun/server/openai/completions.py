"""/v1/completions, and the routes of OpenAI's that a text model has no answer for."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanorun.server.errors import ApiError
from nanorun.server.openai.completions_body import CompletionRequest
from nanorun.server.openai.completions_writer import CompletionWriter
from nanorun.server.service import Service


def completions_routes(service: Service) -> APIRouter:
    """The routes of plain completions."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Go on with a text or with tokens, whole or as a stream."""
        service.check_model(body.model)
        asked = body.to_asked(default_think=service.settings.think)
        writer = CompletionWriter(
            service.names.name, asked, echo=bool(body.echo), include_usage=body.wants_usage
        )
        return await service.respond(request, asked, writer, stream=bool(body.stream))

    @router.post("/v1/embeddings", response_model=None, include_in_schema=False)
    async def embed() -> Response:
        """Say that there are no embeddings."""
        raise ApiError(
            501,
            f"{service.names.name} writes text and makes no embeddings; serve an embedding model"
            " by another program",
            code="not_supported",
        )

    return router
