from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from nanorun.server.settings import is_loopback
from tests.server.conftest import CHAT, Endpoint, error_of
from tests.support.fakes import reply

Make = Callable[..., Endpoint]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("localhost", True),
        ("LOCALHOST.", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("192.168.1.4", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
    ],
)
def test_loopback_is_this_machine_alone(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost", "localhost:9999", "[::1]:8080"])
async def test_host_of_this_machine_is_let_in(endpoint: Make, host: str) -> None:
    response = await endpoint().request("GET", "/v1/models", headers={"host": host})
    assert response.status_code == 200


@pytest.mark.parametrize("host", ["evil.example:8080", "127.0.0.1.evil.example", "", "["])
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/nothing"])
async def test_host_of_another_name_is_kept_out(endpoint: Make, host: str, path: str) -> None:
    response = await endpoint().request("GET", path, headers={"host": host})
    assert response.status_code == 403
    assert error_of(response)["code"] == "forbidden"


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1", "http://[::1]:80"])
async def test_origin_of_this_machine_is_let_in(endpoint: Make, origin: str) -> None:
    response = await endpoint().request("GET", "/v1/models", headers={"origin": origin})
    assert response.status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "", "http://localhost.evil.io"])
async def test_origin_of_another_page_is_kept_out(endpoint: Make, origin: str) -> None:
    response = await endpoint().request("GET", "/v1/models", headers={"origin": origin})
    assert response.status_code == 403


async def test_names_are_not_checked_where_others_may_ask(endpoint: Make) -> None:
    api = endpoint(host="0.0.0.0", api_keys=("k",))
    headers = {"host": "box.lan:8080", "origin": "http://app.lan", "authorization": "Bearer k"}
    assert (await api.request("GET", "/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize("authorization", ["Bearer one", "bearer two", "Bearer  schlüssel"])
async def test_key_that_is_known_lets_in(endpoint: Make, authorization: str) -> None:
    api = endpoint(api_keys=("one", "two", "schlüssel"))
    headers = {"authorization": authorization.encode()}
    response = await api.request("GET", "/v1/models", headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize("authorization", [None, "Bearer three", "Bearer ", "Basic one", "one"])
async def test_key_that_is_not_known_keeps_out(endpoint: Make, authorization: str | None) -> None:
    headers = {"authorization": authorization} if authorization else {}
    response = await endpoint(api_keys=("one", "two")).request("POST", CHAT, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert error_of(response)["code"] == "invalid_api_key"


async def test_health_needs_no_key(endpoint: Make) -> None:
    assert (await endpoint(api_keys=("one",)).request("GET", "/health")).status_code == 200


async def test_body_announced_too_large_is_refused_unread(endpoint: Make) -> None:
    api = endpoint(max_body_bytes=100)
    response = await api.chat("x" * 200)
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"
    assert api.client.requests == []


async def test_body_too_large_is_refused_while_it_arrives(endpoint: Make) -> None:
    n_sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal n_sent
        while n_sent < 1000:
            n_sent += 1
            yield b" " * 50

    headers = {"content-type": "application/json"}
    response = await endpoint(max_body_bytes=100).request(
        "POST", CHAT, content=endless(), headers=headers
    )
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"
    assert n_sent <= 4


async def test_body_of_the_largest_size_is_let_in(endpoint: Make) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}]}'
    headers = {"content-type": "application/json"}
    api = endpoint(max_body_bytes=len(body))
    assert (await api.request("POST", CHAT, content=body, headers=headers)).status_code == 200


PAGE = "https://app.example"


def preflight(origin: str) -> dict[str, str]:
    return {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }


async def test_page_that_is_allowed_asks_and_reads(endpoint: Make) -> None:
    api = endpoint(reply("x"), allow_origins=(PAGE,), api_keys=("k",))
    before = await api.request("OPTIONS", CHAT, headers=preflight(PAGE))
    assert before.status_code == 204
    assert before.headers["access-control-allow-origin"] == PAGE
    assert before.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in before.headers["access-control-allow-methods"]
    body = {"messages": [{"role": "user", "content": "x"}]}
    headers = {"origin": PAGE, "authorization": "Bearer k"}
    asked = await api.request("POST", CHAT, json=body, headers=headers)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == PAGE
    refused = await api.request("POST", CHAT, json=body, headers={"origin": PAGE})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == PAGE  # or it could not read why


async def test_answers_are_marked_as_what_they_are(endpoint: Make) -> None:
    response = await endpoint().request("GET", "/health")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"
