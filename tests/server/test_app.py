from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest

from tests.server.conftest import CHAT, Endpoint, error_of
from tests.support.fakes import MODEL_INFO

Make = Callable[..., Endpoint]


async def test_models_lists_the_one_there_is(endpoint: Make) -> None:
    body = (await endpoint().request("GET", "/v1/models")).json()
    assert body["object"] == "list"
    (model,) = body["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("pico", "model", "nanorun")
    assert model["max_model_len"] == MODEL_INFO.n_ctx
    assert model["meta"]["n_ctx_train"] == MODEL_INFO.n_ctx_train


async def test_model_is_shown_by_name(endpoint: Make) -> None:
    api = endpoint()
    assert (await api.request("GET", "/v1/models/pico")).json()["id"] == "pico"
    missing = await api.request("GET", "/v1/models/org/other")
    assert missing.status_code == 404
    assert error_of(missing)["code"] == "model_not_found"


async def test_path_unknown_is_named(endpoint: Make) -> None:
    response = await endpoint().request("GET", "/v1/nothing")
    assert response.status_code == 404
    assert "GET /v1/nothing" in error_of(response)["message"]


async def test_method_not_allowed_names_the_right_one(endpoint: Make) -> None:
    response = await endpoint().request("GET", CHAT)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert "POST" in error_of(response)["message"]


async def post(
    api: Endpoint, body: bytes, content_type: str = "application/json"
) -> httpx.Response:
    return await api.request("POST", CHAT, content=body, headers={"content-type": content_type})


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"messages": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:20]),
)
async def test_body_that_is_no_request_is_refused(endpoint: Make, body: bytes) -> None:
    response = await post(endpoint(), body)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


async def test_body_of_another_type_says_which_is_needed(endpoint: Make) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
    response = await post(endpoint(), body, "text/plain")
    assert response.status_code == 400
    assert "application/json" in error_of(response)["message"]


async def test_validation_names_the_field(endpoint: Make) -> None:
    image = [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
    response = await endpoint().request(
        "POST", CHAT, json={"messages": [{"role": "user", "content": image}]}
    )
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == "messages[0].content[0]"
    assert error["message"] == "messages[0].content[0]: it is image_url; the model reads text only"
