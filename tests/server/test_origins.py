from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.server.conftest import CHAT, Endpoint, error_of

Make = Callable[..., Endpoint]
PAGE = "https://app.example"
ALLOWED = "access-control-allow-origin"


def asks(origin: str = PAGE, **more: str) -> dict[str, str]:
    return {"origin": origin, "access-control-request-method": "POST", **more}


@pytest.mark.parametrize(
    "origin", [PAGE, "null", "app://obsidian.md", "tauri://localhost", "vscode-webview://1a2b"]
)
async def test_preflight_of_an_allowed_page_is_answered(endpoint: Make, origin: str) -> None:
    api = endpoint(allow_origins=(origin,), api_keys=("k",))
    wanted = "authorization, content-type, x-stainless-os"
    asked = {
        "access-control-request-headers": wanted,
        "access-control-request-private-network": "true",
    }
    response = await api.request("OPTIONS", CHAT, headers=asks(origin, **asked))
    assert (response.status_code, response.content) == (204, b"")
    assert response.headers[ALLOWED] == origin
    assert response.headers["vary"] == "Origin"
    assert response.headers["access-control-allow-headers"] == wanted
    assert response.headers["access-control-allow-private-network"] == "true"
    assert "POST" in response.headers["access-control-allow-methods"]


@pytest.mark.parametrize("path", [CHAT, "/health", "/nothing"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_preflight_of_another_page_says_how_to_let_it_in(
    endpoint: Make, path: str, host: str
) -> None:
    api = endpoint(host=host, api_keys=("k",))
    response = await api.request("OPTIONS", path, headers=asks())
    assert response.status_code == 403
    assert ALLOWED not in response.headers
    assert f"nanorun serve --allow-origin '{PAGE}'" in error_of(response)["message"]


async def test_page_of_this_machine_reads_no_answers_unless_allowed(endpoint: Make) -> None:
    page = "http://localhost:3000"
    preflight = await endpoint().request("OPTIONS", CHAT, headers=asks(page))
    assert preflight.status_code == 403
    answer = await endpoint().request("GET", "/v1/models", headers={"origin": page})
    assert answer.status_code == 200
    assert ALLOWED not in answer.headers


async def test_allowed_page_reads_answers_errors_and_streams(endpoint: Make) -> None:
    api = endpoint(allow_origins=(PAGE,))
    body = {"messages": [{"role": "user", "content": "hi"}]}
    headers = {"origin": PAGE}
    for fields, status in (({}, 200), ({"stream": True}, 200), ({"messages": 5}, 400)):
        response = await api.request("POST", CHAT, json={**body, **fields}, headers=headers)
        assert response.status_code == status
        assert response.headers[ALLOWED] == PAGE
    assert (await api.request("GET", "/no", headers=headers)).headers[ALLOWED] == PAGE


async def test_refusals_of_the_gate_can_be_read_by_an_allowed_page(endpoint: Make) -> None:
    api = endpoint(allow_origins=(PAGE,), api_keys=("k",))
    response = await api.request("GET", "/v1/models", headers={"origin": PAGE})
    assert (response.status_code, response.headers[ALLOWED]) == (401, PAGE)


async def test_star_allows_every_page(endpoint: Make) -> None:
    api = endpoint(allow_origins=("*",))
    response = await api.request("OPTIONS", CHAT, headers=asks("chrome-extension://abc"))
    assert (response.status_code, response.headers[ALLOWED]) == (204, "chrome-extension://abc")


@pytest.mark.parametrize("host", ["host.docker.internal:8080", "foo.localhost"])
async def test_host_that_is_refused_is_let_in_by_its_name(endpoint: Make, host: str) -> None:
    name = host.partition(":")[0]
    refused = await endpoint().request("GET", "/v1/models", headers={"host": host})
    assert refused.status_code == 403
    assert f"nanorun serve --allow-host '{name}'" in error_of(refused)["message"]
    api = endpoint(allow_hosts=(name,))
    assert (await api.request("GET", "/v1/models", headers={"host": host})).status_code == 200
    evil = await api.request("GET", "/v1/models", headers={"host": "evil.example"})
    assert evil.status_code == 403


async def test_hosts_given_hold_beyond_this_machine_too(endpoint: Make) -> None:
    api = endpoint(host="0.0.0.0", api_keys=("k",), allow_hosts=("box.lan",))
    key = {"x-api-key": "k"}
    for host, status in (("box.lan:8080", 200), ("evil.example", 403)):
        response = await api.request("GET", "/v1/models", headers={"host": host, **key})
        assert response.status_code == status


async def test_every_answer_has_an_id_and_is_kept_by_nobody(endpoint: Make) -> None:
    api = endpoint(api_keys=("k",))
    answers = [await api.request("GET", path) for path in ("/health", "/v1/models", "/no")]
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert answer.headers["cache-control"] == "no-store"
