from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from nanorun.server import sse


def test_event_is_one_line_of_json() -> None:
    assert sse.encode({"a": "x\ny ü"}) == 'data: {"a":"x\\ny ü"}\n\n'.encode()


def test_comment_cannot_become_an_event() -> None:
    assert sse.comment("one\ndata: two") == b": one data: two\n\n"


async def forever() -> Any:
    await asyncio.Event().wait()


async def test_work_is_returned_while_the_client_stays() -> None:
    async def work() -> int:
        return 5

    assert await sse.while_connected(forever, work()) == 5


async def test_work_that_fails_raises_its_error() -> None:
    async def work() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await sse.while_connected(forever, work())


async def test_work_is_cancelled_when_the_client_leaves() -> None:
    cleaned_up = False

    async def work() -> None:
        nonlocal cleaned_up
        try:
            await asyncio.Event().wait()
        finally:
            cleaned_up = True

    async def receive() -> Any:
        await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        await sse.while_connected(receive, work())
    assert cleaned_up


async def test_pauses_are_marked_and_events_kept_in_order() -> None:
    pause_seen = asyncio.Event()

    async def numbers() -> AsyncIterator[int]:
        yield 0
        await pause_seen.wait()
        yield 1
        yield 2

    seen = []
    async for item in sse.with_pauses(numbers(), 0.05):
        seen.append(item)
        if item is None:
            pause_seen.set()
    assert [item for item in seen if item is not None] == [0, 1, 2]
    assert None in seen[: seen.index(1)]


async def test_pauses_end_with_the_error_of_the_events() -> None:
    async def broken() -> AsyncIterator[int]:
        yield 1
        raise ZeroDivisionError

    seen = []
    with pytest.raises(ZeroDivisionError):
        async for item in sse.with_pauses(broken(), 1):
            seen.append(item)
    assert seen == [1]
