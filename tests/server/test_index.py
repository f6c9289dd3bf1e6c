from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.server.conftest import CHAT, Endpoint, error_of

Make = Callable[..., Endpoint]


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/"])
async def test_root_says_what_is_where(endpoint: Make, path: str) -> None:
    body = (await endpoint().request("GET", path)).json()
    assert (body["name"], body["model"]) == ("nanorun", "pico")
    assert {CHAT, "/v1/models", "/health"} <= set(body["routes"])
    assert "/v1/embeddings" not in body["routes"]
    assert (await endpoint().request("HEAD", path)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/audio/speech", "/v1/files"])
async def test_what_is_not_served_is_told(endpoint: Make, path: str) -> None:
    response = await endpoint().request("POST", path, json={})
    assert response.status_code == 404
    error = error_of(response)
    assert error["code"] == "not_served"
    assert error["message"].startswith("nanorun serves no ")
