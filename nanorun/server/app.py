"""The endpoint's routes."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from nanorun import __version__
from nanorun.model.chat import ModelInfo
from nanorun.runtime.protocol import Client
from nanorun.server.chat import ChatEndpoint
from nanorun.server.errors import ApiError, install_handlers
from nanorun.server.gate import Gate
from nanorun.server.replies import model_object
from nanorun.server.schema import ChatRequest, ControlRequest
from nanorun.server.settings import ServerSettings


def create_app(
    client: Client, *, model_name: str, settings: ServerSettings | None = None
) -> FastAPI:
    """The endpoint over one model.

    Args:
        client: What answers; the caller starts and closes it.
        model_name: The model's name towards clients.
        settings: Limits and rules; those of a loopback endpoint by default.
    """
    settings = settings or ServerSettings()
    created = int(time.time())
    chat = ChatEndpoint(client, model_name, settings)
    # Swagger's pages would load scripts from the network.
    app = FastAPI(title="nanorun", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, settings=settings)
    install_handlers(app)

    def info() -> ModelInfo:
        if client.info is None:
            raise ApiError(503, "the model is not loaded", type="server_error", code="not_ready")
        return client.info

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether requests can be answered."""
        info()
        return {"status": "ok", "model": model_name, "n_active": chat.admission.n_active}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The models there are: one."""
        return {"object": "list", "data": [model_object(model_name, info(), created)]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        """One model."""
        if name != model_name:
            raise ApiError(404, f"there is no model {name!r} here", code="model_not_found")
        return model_object(model_name, info(), created)

    @app.post("/v1/chat/completions", response_model=None)
    async def complete_chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, whole or as a stream."""
        return await chat.answer(body, request)

    @app.post("/v1/chat/completions/control")
    async def control_chat(body: ControlRequest) -> dict[str, Any]:
        """End the thinking of a reply that streams, or give it another budget."""
        return await chat.control(body)

    return app
