"""What is where, for whoever opens the endpoint's address, and what nanorun does not do."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from nanorun import __version__
from nanorun.server.errors import ApiError

_UNSERVED = {
    "images": "images: the model reads and writes text",
    "audio": "audio: the model reads and writes text",
    "moderations": "moderation",
    "files": "stored files: send their text in the messages",
    "batches": "batches: send requests side by side, they wait their turn",
    "fine_tuning": "fine-tuning",
    "assistants": "assistants: use /v1/chat/completions",
    "threads": "threads: use /v1/chat/completions",
    "conversations": "conversations: use /v1/responses with previous_response_id",
}
"""Parts of OpenAI's API, by the first word after /v1/, as a 404 goes on after "no"."""


def index_routes(model_name: str) -> APIRouter:
    """The endpoint's table of contents, and answers for what it has not."""
    router = APIRouter()

    @router.get("/")
    @router.get("/v1", include_in_schema=False)
    async def index(request: Request) -> dict[str, Any]:
        """What answers here, and which routes there are."""
        routes = sorted(request.app.openapi()["paths"])
        return {"name": "nanorun", "version": __version__, "model": model_name, "routes": routes}

    for part, what in _UNSERVED.items():
        _refuse(router, part, what)
    return router


def _refuse(router: APIRouter, part: str, what: str) -> None:
    async def refuse() -> None:
        raise ApiError(404, f"nanorun serves no {what}", code="not_served")

    for path in (f"/v1/{part}", f"/v1/{part}/{{rest:path}}"):
        methods = ["GET", "POST", "DELETE"]
        router.add_api_route(path, refuse, methods=methods, include_in_schema=False)
