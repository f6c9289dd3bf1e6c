"""Ollama's routes. The model is loaded and fetched by nanorun's own commands, not from here."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from nanorun import __version__
from nanorun.file_names import readable
from nanorun.model.chat import ModelInfo
from nanorun.server.errors import ApiError
from nanorun.server.ollama.bodies import OllamaChat, OllamaGenerate, OllamaRequest
from nanorun.server.ollama.writer import OllamaWriter
from nanorun.server.service import Service

_NEVER = "9999-12-31T23:59:59Z"
_ELSEWHERE = {
    "pull": "nanorun convert, then nanorun serve MODEL",
    "push": "huggingface-cli upload",
    "create": "nanorun convert",
    "copy": "cp",
    "delete": "rm",
    "embed": "another program with an embedding model",
    "embeddings": "another program with an embedding model",
}
"""What Ollama does over HTTP and nanorun does not, with what does it."""


def ollama_routes(service: Service) -> APIRouter:
    """The routes of Ollama's API."""
    router = APIRouter(prefix="/api")
    opened_at = datetime.now(UTC).isoformat()

    def name_of(asked: str | None) -> str:
        service.check_model(asked)
        return readable(asked or service.names.name)

    @router.get("/version")
    async def version() -> dict[str, str]:
        """Which program answers."""
        return {"version": __version__}

    @router.get("/tags")
    async def tags() -> dict[str, Any]:
        """The models there are: one."""
        return {"models": [_listed(service.names.name, service.info(), opened_at)]}

    @router.get("/ps")
    async def running() -> dict[str, Any]:
        """The models that are loaded."""
        info = service.info()
        listed = _listed(service.names.name, info, opened_at)
        more = {"expires_at": _NEVER, "size_vram": 0, "context_length": info.n_ctx}
        return {"models": [{**listed, **more}]}

    @router.post("/show")
    async def show(body: dict[str, Any]) -> dict[str, Any]:
        """One model."""
        asked = body.get("model") or body.get("name")
        name_of(asked if isinstance(asked, str | None) else str(asked))
        return _shown(service.info(), opened_at)

    @router.post("/chat", response_model=None)
    async def chat(body: OllamaChat, request: Request) -> Response:
        """Answer a conversation, whole or a line at a time."""
        name = name_of(body.model)
        if not body.messages:
            return _loaded(name, body, {"message": {"role": "assistant", "content": ""}})
        asked = body.to_asked(default_think=service.settings.think)
        writer = OllamaWriter(name, asked, "chat")
        return await service.respond(request, asked, writer, stream=body.streams)

    @router.post("/generate", response_model=None)
    async def generate(body: OllamaGenerate, request: Request) -> Response:
        """Answer one question, or go on with a text (`raw`)."""
        name = name_of(body.model)
        if not body.prompt:
            return _loaded(name, body, {"response": ""})
        asked = body.to_asked(default_think=service.settings.think)
        writer = OllamaWriter(name, asked, "generate")
        return await service.respond(request, asked, writer, stream=body.streams)

    @router.api_route("/{verb}", methods=["POST", "DELETE"], include_in_schema=False)
    async def elsewhere(verb: str) -> Response:
        """Say what does what is not done here."""
        if verb not in _ELSEWHERE:
            raise ApiError(404, f"there is no /api/{verb}", code="unknown_url")
        message = f"/api/{verb} is not served; use {_ELSEWHERE[verb]}"
        raise ApiError(400, message, code="not_supported")

    return router


def _loaded(name: str, body: OllamaRequest, said: dict[str, Any]) -> JSONResponse:
    """The answer to a request that asks nothing: clients send it to load or unload a model.

    `nanorun serve --keep-alive` decides how long the model stays; it is here when it is asked.
    """
    reason = "unload" if body.unloads else "load"
    head = {"model": name, "created_at": datetime.now(UTC).isoformat(), **said}
    return JSONResponse({**head, "done": True, "done_reason": reason})


def _listed(name: str, info: ModelInfo, opened_at: str) -> dict[str, Any]:
    return {
        "name": name,
        "model": name,
        "modified_at": opened_at,
        "size": info.file_bytes,
        "digest": "",
        "details": _details(info),
    }


def _details(info: ModelInfo) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": info.arch,
        "families": [info.arch],
        "parameter_size": f"{info.n_params / 1e9:.1f}B",
        "quantization_level": (info.recipe or "unknown").upper(),
    }


def _shown(info: ModelInfo, opened_at: str) -> dict[str, Any]:
    return {
        "modified_at": opened_at,
        "details": _details(info),
        "model_info": {
            "general.architecture": info.arch,
            "general.name": info.name,
            "general.parameter_count": info.n_params,
            f"{info.arch}.context_length": info.n_ctx,
            f"{info.arch}.block_count": info.n_layer,
        },
        "capabilities": ["completion", "tools", "thinking"],
    }
