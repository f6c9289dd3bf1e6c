from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nanorun.model.engine_state import EngineState
from tests.server.conftest import Endpoint
from tests.support.fakes import FakeClient

Make = Callable[..., Endpoint]

SHORT = "the model needs 17.0 GiB of main memory, but 15.0 GiB are free"
COMMON = {"model": "pico", "n_active": 0}


def unavailable(message: str) -> dict[str, Any]:
    """As llama.cpp's server has it."""
    return {"message": message, "type": "unavailable_error", "code": 503}


@pytest.mark.parametrize(
    ("state", "status", "body"),
    [
        (EngineState("ready", 0.0), 200, {"status": "ok"}),
        (EngineState("unloaded", 0.0), 200, {"status": "unloaded"}),
        (
            EngineState("unloaded", 0.0, reason="the engine's process was ended by SIGKILL"),
            200,
            {"status": "unloaded", "reason": "the engine's process was ended by SIGKILL"},
        ),
        (
            EngineState("loading", 0.0, progress=0.25),
            503,
            {"status": "loading", "progress": 0.25, "error": unavailable("Loading model")},
        ),
        (
            EngineState("failed", 0.0, reason=SHORT),
            503,
            {"status": "error", "reason": SHORT, "error": unavailable(SHORT)},
        ),
    ],
)
async def test_health_tells_what_becomes_of_a_request(
    endpoint: Make, state: EngineState, status: int, body: dict[str, Any]
) -> None:
    api = endpoint(client=FakeClient(state=state))
    response = await api.request("GET", "/health")
    assert response.status_code == status
    assert response.json() == {**body, **COMMON}
    head = await api.request("HEAD", "/health")
    assert head.status_code == status
