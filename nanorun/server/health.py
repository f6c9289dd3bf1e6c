"""`/health`: what becomes of a request that comes now, for those who start and watch servers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from nanorun.model.engine_state import EngineState, Phase
from nanorun.runtime.protocol import LocalClient
from nanorun.server.admission import Admission

_STATUSES: dict[Phase, str] = {
    "loading": "loading",
    "ready": "ok",
    "unloaded": "unloaded",  # no failure: the next request loads it
    "failed": "error",
}


def health_routes(client: LocalClient, model_name: str, admission: Admission) -> APIRouter:
    """The route.

    Args:
        client: What answers.
        model_name: The model's name towards clients.
        admission: Counts the requests.
    """
    router = APIRouter()

    @router.get("/health")
    async def health() -> JSONResponse:
        """Whether requests can be answered: 503 while the model is loaded, or cannot be."""
        state = client.state
        body = {**health_body(state), "model": model_name, "n_active": admission.n_active}
        return JSONResponse(body, status_code=503 if "error" in body else 200)

    return router


def health_body(state: EngineState) -> dict[str, Any]:
    """The state, with the error beside it that clients of llama.cpp's server look for."""
    body: dict[str, Any] = {"status": _STATUSES[state.phase]}
    if state.progress is not None:
        body["progress"] = round(state.progress, 3)
    if state.reason is not None:
        body["reason"] = state.reason
    if state.phase in ("loading", "failed"):
        message = "Loading model" if state.phase == "loading" else state.reason
        body["error"] = {"message": message, "type": "unavailable_error", "code": 503}
    return body
