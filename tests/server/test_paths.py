from __future__ import annotations

from collections.abc import Callable

import pytest

from nanorun.server.paths import near, plain
from tests.server.conftest import CHAT, Endpoint, error_of

Make = Callable[..., Endpoint]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("//v1/models", "/v1/models"),
        ("/v1//models", "/v1/models"),
        ("/v1/models/", "/v1/models"),
        ("/v1/v1/models", "/v1/models"),
        ("//v1//v1///v1/models//", "/v1/models"),
        ("/v1/v10/models", "/v1/v10/models"),
        ("/v1/v1", "/v1"),
        ("/", "/"),
        ("//", "/"),
        ("", "/"),
    ],
)
def test_path_is_taken_as_its_plain_form(written: str, expected: str) -> None:
    assert plain(written) == expected


def test_routes_near_a_path_come_likeliest_first() -> None:
    known = ["/health", "/v1/models", "/v1/chat/completions", "/v1/completions"]
    assert near("/models", known) == ["/v1/models"]
    assert near("/chat/completions", known)[0] == "/v1/chat/completions"
    assert near("/", known) == []


@pytest.mark.parametrize("path", ["/v1//chat/completions", f"/v1{CHAT}", f"{CHAT}/"])
async def test_chat_is_answered_by_every_form_of_its_path(endpoint: Make, path: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    response = await endpoint().request("POST", path, json=body)
    assert response.status_code == 200
    assert response.json()["object"] == "chat.completion"


async def test_head_is_answered_as_get_without_a_body(endpoint: Make) -> None:
    for path in ("/v1/models", "/health"):
        response = await endpoint().request("HEAD", path)
        assert (response.status_code, response.content) == (200, b"")


async def test_unknown_path_names_the_route_that_is_meant(endpoint: Make) -> None:
    error = error_of(await endpoint().request("GET", "/message"))
    assert error["code"] == "unknown_url"
    assert error["message"] == "there is no GET /message; there is /v1/messages"
