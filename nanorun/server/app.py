"""The endpoint, put together: who is let in, the APIs, and what failures look like."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from nanorun import __version__
from nanorun.runtime.protocol import LocalClient
from nanorun.server.anthropic.messages import messages_routes
from nanorun.server.errors import install_handlers
from nanorun.server.gate import Gate
from nanorun.server.health import health_routes
from nanorun.server.index import index_routes
from nanorun.server.looking import looking_routes
from nanorun.server.metrics import EngineCollector, Metrics
from nanorun.server.model_names import ModelNames
from nanorun.server.ollama.routes import ollama_routes
from nanorun.server.openai.chat import chat_routes
from nanorun.server.openai.completions import completions_routes
from nanorun.server.openai.models import models_routes
from nanorun.server.openai.responses.routes import Responses, responses_routes
from nanorun.server.openai.responses.store import ResponseStore
from nanorun.server.request_log import ContentsLog, log_request
from nanorun.server.service import Service
from nanorun.server.settings import ServerSettings
from nanorun.server.texts import text_routes
from nanorun.server.watch import Watch


def create_app(
    client: LocalClient,
    *,
    model_name: str,
    settings: ServerSettings | None = None,
    planned_bytes: Callable[[], int | None] = lambda: None,
) -> FastAPI:
    """The endpoint over one model.

    Args:
        client: What answers; the caller starts and closes it.
        model_name: The model's name towards clients.
        settings: Limits and rules; those of a loopback endpoint by default.
        planned_bytes: What the engine's process is to take of main memory; None if not known.
    """
    settings = settings or ServerSettings()
    names = ModelNames(model_name, settings.aliases, any_name=settings.any_model)
    service = Service(client, names, settings)
    responses = Responses(service, ResponseStore.of(settings))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        yield
        await responses.close()

    # Swagger's pages would load scripts from the network.
    app = FastAPI(
        title="nanorun", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    metrics = Metrics()
    metrics.registry.register(EngineCollector(client, service.admission, planned_bytes))
    _wrap(app, settings, metrics)
    install_handlers(app)

    app.include_router(health_routes(client, model_name, service.admission))
    app.include_router(index_routes(model_name))
    app.include_router(looking_routes(service, metrics))
    app.include_router(models_routes(service))
    app.include_router(chat_routes(service))
    app.include_router(completions_routes(service))
    app.include_router(text_routes(service))
    app.include_router(responses_routes(responses))
    app.include_router(messages_routes(service))
    if settings.ollama:
        app.include_router(ollama_routes(service))
    return app


def _wrap(app: FastAPI, settings: ServerSettings, metrics: Metrics) -> None:
    """Put around the routes who is let in, and around that who looks on: refusals count, too."""
    app.add_middleware(Gate, settings=settings)
    if settings.log_contents:
        app.add_middleware(ContentsLog)
    on_end = [metrics.take, *([log_request] if settings.log_requests else [])]
    app.add_middleware(Watch, on_end=on_end)
