"""/v1/models: the one model there is."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter

from nanorun.model.chat import ModelInfo
from nanorun.server.service import Service


def models_routes(service: Service) -> APIRouter:
    """The routes that list the model."""
    router = APIRouter()
    created = int(time.time())

    @router.get("/models", include_in_schema=False)
    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The models there are: one."""
        model = model_object(service.names.name, service.info(), created)
        return {"object": "list", "data": [model]}

    @router.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        """One model."""
        service.check_model(name)
        return model_object(service.names.name, service.info(), created)

    return router


def model_object(name: str, info: ModelInfo, created: int) -> dict[str, Any]:
    """The model as /v1/models lists it, its context under vLLM's name and the rest in `meta`."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "nanorun",
        "max_model_len": info.n_ctx,
        "meta": {
            "n_ctx": info.n_ctx,
            "n_ctx_train": info.n_ctx_train,
            "n_params": info.n_params,
            "n_vocab": info.n_vocab,
            "size": info.file_bytes,
            "recipe": info.recipe,
        },
    }
