"""A reply must begin in time, or whoever asks is told to come back later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from nanorun.model.chat import Event, Notice


async def begun_within(
    events: AsyncIterator[Event | None],
    limit_s: float | None,
    *,
    on_begin: Callable[[], None],
    too_late: Callable[[], Exception],
) -> AsyncGenerator[Event | None, None]:
    """The same events, of a reply that the engine takes up soon enough.

    Args:
        events: The reply's.
        limit_s: Seconds until the first of them that is no notice; None for no limit.
        on_begin: Called with that one.
        too_late: Makes what is raised instead of it.
    """
    deadline = None if limit_s is None else asyncio.get_running_loop().time() + limit_s
    while True:
        within = asyncio.timeout_at(deadline)
        try:
            async with within:
                event = await anext(events)
        except StopAsyncIteration:
            return
        except TimeoutError:
            if within.expired():
                raise too_late() from None
            raise
        if event is not None and not isinstance(event, Notice):
            break
        yield event
    on_begin()
    yield event
    async for event in events:
        yield event
