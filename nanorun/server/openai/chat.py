"""/v1/chat/completions and the control of a reply that streams."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanorun.server.errors import ApiError
from nanorun.server.openai.chat_body import ChatRequest, ControlRequest
from nanorun.server.openai.chat_writer import ChatWriter
from nanorun.server.service import Service


def chat_routes(service: Service) -> APIRouter:
    """The routes of chat completions."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def complete_chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, whole or as a stream."""
        service.check_model(body.model)
        asked = body.to_asked(default_think=service.settings.think)
        writer = ChatWriter(
            service.names.name, asked, service.settings,
            include_usage=body.wants_usage, hides_thinking=body.hides_thinking,
        )  # fmt: skip
        return await service.respond(request, asked, writer, stream=bool(body.stream))

    @router.post("/v1/chat/completions/control")
    async def control_chat(body: ControlRequest) -> dict[str, Any]:
        """End the thinking of a reply that streams, or give it another budget.

        As llama.cpp's server lets one do.
        """
        budget = body.reasoning_budget
        if body.action == "reasoning_budget" and budget is None:
            message = "reasoning_budget must say how many tokens"
            raise ApiError(400, message, code="invalid_value", param="reasoning_budget")
        generations = service.streams.get(body.id)
        if generations is None:
            return {"success": False, "message": "no reply with this id streams now"}
        for generation in generations:
            if body.action == "reasoning_end":
                await generation.finish_thinking()
            else:
                await generation.set_budget(None if budget is None or budget < 0 else budget)
        return {"success": True}

    return router
