from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from nanorun.server.errors import ApiError
from nanorun.server.limits import (
    MAX_DEPTH,
    MAX_MESSAGES,
    MAX_SCHEMA_CHARS,
    MAX_TOOLS,
    check_limits,
)
from tests.server.conftest import CHAT, Endpoint
from tests.support.fakes import reply

Make = Callable[..., Endpoint]
ASKED = [{"role": "user", "content": "x"}]
ROUTES = {
    CHAT: {"messages": ASKED},
    "/v1/completions": {"prompt": "x"},
    "/v1/messages": {"messages": ASKED, "max_tokens": 5},
    "/api/chat": {"messages": ASKED, "stream": False},
    "/api/generate": {"prompt": "x", "stream": False},
}


def nested(n_levels: int, inner: Any = "x") -> Any:
    """A value with lists and objects around it, in turns."""
    value = inner
    for i in range(n_levels):
        value = [value] if i % 2 else {"a": value}
    return value


@pytest.mark.parametrize(
    ("body", "field", "limit"),
    [
        ({"messages": [{}] * (MAX_MESSAGES + 1)}, "messages", MAX_MESSAGES),
        ({"input": [{}] * (MAX_MESSAGES + 1)}, "input", MAX_MESSAGES),
        ({"tools": [{}] * (MAX_TOOLS + 1)}, "tools", MAX_TOOLS),
        ({"tools": [{}, {"a": ["x" * MAX_SCHEMA_CHARS]}]}, "tools[1]", MAX_SCHEMA_CHARS),
        ({"format": {"x" * MAX_SCHEMA_CHARS: 1}}, "format", MAX_SCHEMA_CHARS),
        ({"response_format": {"a": [1] * MAX_SCHEMA_CHARS}}, "response_format", MAX_SCHEMA_CHARS),
        ({"messages": nested(MAX_DEPTH + 1)}, "messages", MAX_DEPTH),
        ({"metadata": nested(500)}, "metadata", MAX_DEPTH),
    ],
    ids=lambda value: str(value)[:30],
)
def test_body_beyond_a_limit_is_refused_by_name(body: Any, field: str, limit: int) -> None:
    with pytest.raises(ApiError) as caught:
        check_limits(body)
    assert (caught.value.status, caught.value.param) == (400, field)
    assert caught.value.message.startswith(f"{field}: ")
    assert str(limit) in caught.value.message


def test_body_at_its_limits_is_taken() -> None:
    check_limits({
        "messages": [{}] * MAX_MESSAGES,
        "tools": [{}] * MAX_TOOLS,
        "format": "x" * MAX_SCHEMA_CHARS,
        "metadata": nested(MAX_DEPTH),
        "model": None,
    })  # fmt: skip


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("n_levels", [MAX_DEPTH + 2, 400, 990, 5_000, 200_000])
async def test_nesting_of_any_depth_is_refused_on_every_route(
    endpoint: Make, path: str, n_levels: int
) -> None:
    deep = b'{"a":' * n_levels + b"1" + b"}" * n_levels
    body = json.dumps(ROUTES[path]).encode()[:-1] + b', "tools": [' + deep + b"]}"
    headers = {"content-type": "application/json"}
    api = endpoint(reply("x"))
    response = await api.request("POST", path, content=body, headers=headers)
    assert response.status_code == 400
    assert api.client.requests == []


@pytest.mark.parametrize("path", ROUTES)
async def test_limits_hold_on_every_route(endpoint: Make, path: str) -> None:
    api = endpoint(reply("x"))
    assert (await api.request("POST", path, json=ROUTES[path])).status_code == 200
    body = {**ROUTES[path], "model": nested(MAX_DEPTH + 1)}
    response = await api.request("POST", path, json=body)
    assert response.status_code == 400
    assert f"model: it is nested deeper than the {MAX_DEPTH} levels" in response.text


@pytest.mark.parametrize("n_levels", [20, MAX_DEPTH - 10])
async def test_deep_schemas_and_results_within_the_limit_are_no_failure(
    endpoint: Make, n_levels: int
) -> None:
    """What walks through them must not run into Python's own limit."""
    schema: Any = {"type": "string"}
    for _ in range(n_levels // 2):
        schema = {"type": "object", "properties": {"a": schema}}
    function = {"name": "f", "parameters": schema}
    api = endpoint(reply("x"))
    response = await api.chat(
        tools=[{"type": "function", "function": function}],
        messages=[
            *ASKED,
            {"role": "assistant", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ]},
            {"role": "tool", "tool_call_id": "c", "content": nested(n_levels)},
        ],
    )  # fmt: skip
    assert response.status_code == 200
