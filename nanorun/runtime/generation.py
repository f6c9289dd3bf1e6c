"""A reply of the local engine, from the request to its last event."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self

from nanorun.errors import EngineDied, EngineOutOfMemory, MemoryPlanError, NanorunError
from nanorun.model.chat import Event, Finished, Notice, PrefillProgress
from nanorun.runtime.keeper import EngineKeeper
from nanorun.runtime.process.child import Child
from nanorun.runtime.process.frames import (
    Answer,
    Cancel,
    Failed,
    FinishThinking,
    Generate,
    Request,
    Said,
    SetBudget,
)


class EngineGeneration:
    """A reply of an `EngineClient`; see `Generation`."""

    def __init__(self, keeper: EngineKeeper, request: Generate) -> None:
        self._keeper = keeper
        self._id = request.id
        self._asked = request
        self._requests: list[Request] = [request]
        """The request, and what was asked of it before the engine could be told."""
        self._child: Child | None = None
        self._stack = contextlib.ExitStack()
        self._inbox: asyncio.Queue[Answer] | None = None
        self._has_heard = False
        """Whether the engine took the request up."""
        self._has_begun = False
        """Whether anything was said that a new attempt would say again."""
        self._attempts = 0
        self._done = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._done:
            raise StopAsyncIteration
        try:
            event = await self._next_event()
            while isinstance(event, NanorunError) and await self._can_begin_anew(event):
                self._stack.close()
                self._inbox = None
                event = await self._next_event()
        except BaseException:
            await self.aclose()
            raise
        if isinstance(event, NanorunError):
            self._end()
            raise event
        self._has_begun = self._has_begun or not isinstance(event, PrefillProgress | Notice)
        if isinstance(event, Finished):
            self._end()
        return event

    async def _next_event(self) -> Event | NanorunError:
        """An event of this reply, an error, or something the person should know first."""
        if self._inbox is None:
            self._child = await self._keeper.ready_child()
            await self._keeper.check_room(self._asked.prompt)
            self._inbox = self._stack.enter_context(self._child.inbox(self._id))
            self._attempts += 1
            try:
                for request in self._requests:
                    await self._child.send(request)
            except EngineDied as error:
                return error
        notice = self._keeper.take_notice()
        if notice is not None:
            return Notice(notice)
        answer = await self._inbox.get()
        if isinstance(answer, Failed):
            return answer.error
        assert isinstance(answer, Said)
        self._has_heard = True
        return answer.event

    async def _can_begin_anew(self, error: NanorunError) -> bool:
        """Whether a failed reply may be asked again without anybody noticing.

        After memory ran out it may if the model can be opened smaller and nothing was said yet;
        after the process died, if it died before it took the request up, once.
        """
        assert self._child is not None
        if isinstance(error, MemoryPlanError | EngineOutOfMemory):
            return await self._keeper.recover(self._child, error) and not self._has_begun
        is_stale = isinstance(error, EngineDied) and not self._child.stopping
        return is_stale and not self._has_heard and self._attempts == 1

    async def cancel(self) -> None:
        """End the reply; `Finished("cancelled")` follows."""
        await self._control(Cancel(self._id))

    async def finish_thinking(self) -> None:
        """Make it answer soon."""
        await self._control(FinishThinking(self._id))

    async def set_budget(self, n_tokens: int | None) -> None:
        """Change its thinking tokens; None for no limit."""
        await self._control(SetBudget(self._id, n_tokens))

    async def aclose(self) -> None:
        """Cancel the reply if it runs, and stop listening."""
        if not self._done:
            await self._control(Cancel(self._id))
            self._end()

    async def _control(self, request: Request) -> None:
        if self._inbox is None:
            self._requests.append(request)
        elif self._child is not None and self._child.alive and not self._done:
            with contextlib.suppress(EngineDied):
                await self._child.send(request)

    def _end(self) -> None:
        if not self._done:
            self._done = True
            self._stack.close()
            self._keeper.rest()
