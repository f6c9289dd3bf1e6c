"""The endpoint, put together: who is let in, the APIs, and what failures look like."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from nanorun import __version__
from nanorun.runtime.protocol import Client
from nanorun.server.anthropic.messages import messages_routes
from nanorun.server.errors import install_handlers
from nanorun.server.gate import Gate
from nanorun.server.model_names import ModelNames
from nanorun.server.ollama.routes import ollama_routes
from nanorun.server.openai.chat import chat_routes
from nanorun.server.openai.completions import completions_routes
from nanorun.server.openai.models import models_routes
from nanorun.server.service import Service
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
    service = Service(client, ModelNames(model_name, any_name=settings.any_model), settings)
    # Swagger's pages would load scripts from the network.
    app = FastAPI(title="nanorun", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, settings=settings)
    install_handlers(app)

    @app.get("/", include_in_schema=False)
    @app.get("/v1", include_in_schema=False)
    async def point_the_way() -> dict[str, Any]:
        """Say what is where."""
        return {
            "nanorun": __version__,
            "model": model_name,
            "paths": sorted(app.openapi()["paths"]),
        }

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether requests can be answered."""
        service.info()
        return {"status": "ok", "model": model_name, "n_active": service.admission.n_active}

    app.include_router(models_routes(service))
    app.include_router(chat_routes(service))
    app.include_router(completions_routes(service))
    app.include_router(messages_routes(service))
    if settings.ollama:
        app.include_router(ollama_routes(service))
    return app
