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
    async for gathering in sse.gathered(numbers(), 0.05):
        seen.append(gathering)
        if not gathering:
            pause_seen.set()
    assert [number for gathering in seen for number in gathering] == [0, 1, 2]
    assert seen[0] == [0] and seen[1] == []


async def test_events_that_come_together_leave_together() -> None:
    async def numbers() -> AsyncIterator[int]:
        for number in range(3):
            yield number
        await asyncio.sleep(0)
        yield 3

    assert [gathering async for gathering in sse.gathered(numbers(), 60)] == [[0, 1, 2], [3]]


async def test_who_takes_events_slowly_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "_MOST_GATHERED", 2)
    n_made = 0

    async def numbers() -> AsyncIterator[int]:
        nonlocal n_made
        for number in range(7):
            n_made += 1
            yield number

    seen = []
    async for gathering in sse.gathered(numbers(), 60):
        assert n_made == len(seen) + len(gathering) <= len(seen) + 2
        for _ in range(5):
            await asyncio.sleep(0)  # the time of others
        assert n_made <= len(seen) + len(gathering) + 2
        seen += gathering
    assert seen == list(range(7))


async def test_pauses_end_with_the_error_of_the_events() -> None:
    async def broken() -> AsyncIterator[int]:
        yield 1
        raise ZeroDivisionError

    seen = []
    with pytest.raises(ZeroDivisionError):
        async for gathering in sse.gathered(broken(), 1):
            seen.append(gathering)
    assert seen == [[1]]


async def test_events_end_when_nobody_takes_them_any_more() -> None:
    has_ended = False

    async def numbers() -> AsyncIterator[int]:
        nonlocal has_ended
        try:
            yield 0
            await asyncio.Event().wait()
        finally:
            has_ended = True

    gatherings = sse.gathered(numbers(), 60)
    assert await anext(gatherings) == [0]
    await gatherings.aclose()
    assert has_ended
