from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from nanorun.model.chat import Event, Notice, TextDelta
from nanorun.server.beginning import begun_within
from tests.server.conftest import CHAT, Endpoint, error_of
from tests.support.fakes import reply

Make = Callable[..., Endpoint]
FAR_S = 1000.0


class TooLateError(Exception):
    pass


async def taken(events: AsyncIterator[Event | None], limit_s: float | None) -> list[object]:
    """What comes of events, with a mark where they begin."""
    seen: list[object] = []
    begun = begun_within(
        events, limit_s, on_begin=lambda: seen.append("begun"), too_late=TooLateError
    )
    async for event in begun:
        seen.append(event)
    return seen


@pytest.mark.parametrize("limit_s", [None, FAR_S])
async def test_reply_begins_with_what_is_no_notice(limit_s: float | None) -> None:
    async def events() -> AsyncIterator[Event | None]:
        yield Notice("x")
        yield TextDelta("a")
        yield TextDelta("b")

    expected = [Notice("x"), "begun", TextDelta("a"), TextDelta("b")]
    assert await taken(events(), limit_s) == expected


async def test_reply_that_never_begins_is_too_late() -> None:
    async def events() -> AsyncIterator[Event | None]:
        yield Notice("x")
        await asyncio.Event().wait()

    with pytest.raises(TooLateError):
        await taken(events(), 0.01)


async def test_reply_that_has_begun_may_take_its_time() -> None:
    async def events() -> AsyncIterator[Event | None]:
        yield TextDelta("a")
        await asyncio.sleep(0.05)
        yield TextDelta("b")

    assert await taken(events(), 0.01) == ["begun", TextDelta("a"), TextDelta("b")]


async def test_timeout_of_the_reply_itself_is_not_called_too_late() -> None:
    async def events() -> AsyncIterator[Event | None]:
        raise TimeoutError("a disk")
        yield

    with pytest.raises(TimeoutError, match="a disk"):
        await taken(events(), FAR_S)


@pytest.mark.parametrize("stream", [False, True])
async def test_request_that_waits_too_long_is_told_when_to_come_back(
    endpoint: Make, stream: bool
) -> None:
    api = endpoint([asyncio.Event(), *reply("x")], max_wait_s=0.05)
    response = await api.chat(stream=stream)
    assert response.status_code == 429
    error = error_of(response)
    assert (error["type"], error["code"]) == ("rate_limit_error", "waited_too_long")
    assert "--max-wait" in error["message"]
    assert int(response.headers["retry-after"]) >= 1
    assert api.client.last.generation.was_abandoned
    assert (await api.request("GET", "/health")).json()["n_active"] == 0


async def test_stream_that_was_kept_alive_ends_with_the_refusal(endpoint: Make) -> None:
    api = endpoint([asyncio.Event(), *reply("x")], max_wait_s=0.2, keepalive_s=0.01)
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    response = await api.request("POST", CHAT, json=body)
    assert response.status_code == 200
    assert '"code":"waited_too_long"' in response.text.split("\n\n")[-2]
