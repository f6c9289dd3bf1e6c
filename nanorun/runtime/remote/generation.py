"""One reply of a remote endpoint: asking, waiting, holding its thinking to a budget, the end."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from typing import Any, Self

from nanorun.errors import EngineDied, NanorunError, UsageError
from nanorun.model.chat import (
    Event,
    Finished,
    GenerateOptions,
    Message,
    ModelInfo,
    Notice,
    RawPrompt,
    Usage,
)
from nanorun.runtime.remote.dialect import (
    OTHER,
    Control,
    check_options,
    completion_body,
    continued_body,
    effort_of,
    hard_cap,
    request_body,
)
from nanorun.runtime.remote.errors import EndpointBusy, EndpointRefused, NothingThere
from nanorun.runtime.remote.http import Endpoint, Response, wait_before
from nanorun.runtime.remote.landing import Landing
from nanorun.runtime.remote.learned import Learned
from nanorun.runtime.remote.reply import RemoteReply

log = logging.getLogger(__name__)

_CHAT = "chat/completions"
_COMPLETIONS = "completions"
_CONTROL = "chat/completions/control"
_EFFORT = "reasoning_effort"


class RemoteGeneration:
    """A reply of a `RemoteClient`; see `nanorun.runtime.protocol.Generation`.

    Args:
        start: Reaches the endpoint, if that is not done.
        http: The endpoint.
        learned: What is known of it; added to.
        prompt: The conversation, or a raw prompt.
        options: How to answer.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable[ModelInfo]],
        http: Endpoint,
        learned: Learned,
        prompt: tuple[Message, ...] | RawPrompt,
        options: GenerateOptions,
    ) -> None:
        self._start = start
        self._http = http
        self._learned = learned
        self._prompt = prompt
        self._options = options
        self._events: AsyncGenerator[Event, None] | None = None
        self._reading: asyncio.Future[Event] | None = None
        self._reply: RemoteReply | None = None
        self._before: Usage | None = None
        """What the first of two calls used."""
        self._landing: Landing | None = None
        self._budgets: list[int | None] = []
        """Budgets asked for before the endpoint was."""
        self._notices: deque[str] = deque()
        self._end_was_asked = False
        self._cancelled = False
        self._done = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._done:
            raise StopAsyncIteration
        if self._cancelled:
            return await self._end_cancelled()
        if self._events is None:
            self._events = self._generate()
        self._reading = asyncio.ensure_future(anext(self._events))
        try:
            await asyncio.wait({self._reading})
        except BaseException:
            await self.aclose()
            raise
        if self._reading.cancelled():
            return await self._end_cancelled()
        try:
            event = self._reading.result()
        except BaseException:
            self._done = True
            raise
        if isinstance(event, Finished):
            await self.aclose()
        return event

    async def cancel(self) -> None:
        """End the reply by closing its connection; `Finished("cancelled")` follows."""
        self._cancelled = True
        if self._reading is not None:
            self._reading.cancel()

    async def aclose(self) -> None:
        """Close the connection if it is open, and stop listening."""
        self._done = True
        if self._reading is not None and not self._reading.done():
            self._reading.cancel()
            await asyncio.wait({self._reading})
            if not self._reading.cancelled():
                self._reading.exception()  # it interests nobody any more
        if self._events is not None:
            await self._events.aclose()

    async def _end_cancelled(self) -> Finished:
        await self.aclose()
        if self._reply is None:
            return Finished("cancelled")
        return self._reply.cancelled(before=self._before)

    # --- control ----------------------------------------------------------------------------

    @property
    def _control(self) -> Control:
        return (self._learned.dialect or OTHER).control

    async def finish_thinking(self) -> None:
        """Make it answer soon, where the endpoint can be made to; a notice says where not."""
        if not self._can_control():
            return
        if self._control is Control.BUDGET_ROUTE:
            await self._ask_control({"action": "reasoning_end"})
        else:
            self._limit(0)

    async def set_budget(self, n_tokens: int | None) -> None:
        """Change its thinking tokens, where the endpoint allows it; None for no limit."""
        if not self._can_control():
            return
        if self._control is Control.BUDGET_ROUTE:
            budget = -1 if n_tokens is None else n_tokens
            await self._ask_control({"action": "reasoning_budget", "reasoning_budget": budget})
            return
        cap = hard_cap(self._options) if self._control is Control.ROUTE else None
        if cap is not None and (n_tokens is None or n_tokens > cap):
            self._notices.append(f"the endpoint holds this reply to {cap} tokens of thinking")
        self._limit(n_tokens)

    def _limit(self, n_tokens: int | None) -> None:
        if self._landing is None:
            self._budgets.append(n_tokens)
        else:
            self._landing.set_budget(n_tokens)

    def _can_control(self) -> bool:
        if self._done or self._cancelled:
            return False
        if self._reply is not None and self._reply.has_begun and not self._reply.in_thinking:
            return False
        if self._learned.dialect is not None and self._control is Control.NONE:
            self._notices.append("this endpoint cannot be told to think less while it thinks")
            return False
        return True

    async def _ask_control(self, action: Mapping[str, Any]) -> None:
        """Use the endpoint's control route.

        That there is none, or that it fails, is worth a notice, and not the reply. That it found
        nothing to change is worth neither: the reply may have ended while it was asked.
        """
        completion_id = self._reply.completion_id if self._reply else None
        if completion_id is None:
            self._notices.append("the endpoint has not begun to answer; ask again when it thinks")
            return
        try:
            answer = await self._http.ask("POST", _CONTROL, {"id": completion_id, **action})
        except NanorunError as error:
            self._notices.append(f"its thinking could not be changed: {error.message}")
            return
        if isinstance(answer, Mapping) and answer.get("success") is False:
            log.debug("%s: %s", self._http.address.base, answer.get("message"))

    # --- events -----------------------------------------------------------------------------

    async def _generate(self) -> AsyncGenerator[Event, None]:
        """The events of the reply; the endpoint is asked once, or until it takes the request.

        It is asked once more where its thinking had to be cut: for the answer after it.
        """
        body = await self._first_body()
        route = _COMPLETIONS if isinstance(self._prompt, RawPrompt) else _CHAT
        n_busy = 0
        leaves_effort = False
        while True:
            accepted = False
            try:
                async with self._http.request("POST", route, body) as response:
                    accepted = True
                    reply = self._begin(response, left_effort=leaves_effort)
                    while (events := await self._next_events(response, reply)) is not None:
                        for event in (*self._take_notices(), *events):
                            yield event
            except EndpointBusy as busy:
                n_busy += 1
                wait_s = wait_before(n_busy, busy, self._http.settings)
                if wait_s is None:
                    raise
                yield Notice(f"{busy.message}; asking again in {wait_s:.1f} s")
                await asyncio.sleep(wait_s)
                continue
            except NothingThere as nothing:
                if route is _CHAT:
                    raise
                raise UsageError(
                    f"{self._http.address.base} takes no raw prompts: it has no {route}",
                    facts=nothing.facts,
                ) from nothing
            except EndpointRefused as refused:
                if accepted or refused.param not in (None, _EFFORT) or _EFFORT not in body:
                    raise
                del body[_EFFORT]
                leaves_effort = True
                continue
            if not reply.is_cut:
                break
            self._before = reply.usage()
            body = continued_body(body, "".join(reply.thinking), reply.n_thinking)
            n_busy = 0
        for event in (*self._take_notices(), *self._finish(reply)):
            yield event

    @property
    def _goes_on_answering(self) -> bool:
        """Whether an answer is continued, so that no thinking comes."""
        if isinstance(self._prompt, RawPrompt) or not self._options.continue_final:
            return False
        return bool(self._prompt[-1].content)

    async def _first_body(self) -> dict[str, Any]:
        """What the endpoint is asked first; reaches it, and settles how its thinking is held."""
        budget = check_options(self._prompt, self._options)
        info = await self._start()
        learned = self._learned
        if isinstance(self._prompt, RawPrompt):
            return completion_body(learned.dialect or OTHER, info.name, self._prompt, self._options)
        body = request_body(
            learned.dialect or OTHER,
            info.name,
            self._prompt,
            self._options,
            thinking_field=learned.thinking_field,
        )
        if not learned.takes_effort and _EFFORT in body:
            del body[_EFFORT]
        elif self._control is Control.NONE and self._options.think.level is None:
            effort = effort_of(self._options.think)
            self._notices.append(
                f"the endpoint takes no budget of thinking tokens; effort {effort!r} was asked"
            )
        can_land = self._control in (Control.ROUTE, Control.CONTINUE)
        if can_land and budget != 0 and not self._goes_on_answering:
            self._landing = Landing(budget, self._options.max_tokens)
            for asked in self._budgets:
                self._landing.set_budget(asked)
        return body

    def _begin(self, response: Response, *, left_effort: bool) -> RemoteReply:
        """Begin to read an answer, whose coming tells that the request was taken."""
        if left_effort and self._learned.takes_effort:
            self._learned.takes_effort = False
            self._notices.append(
                "the endpoint takes no reasoning depth; it thinks as it always does"
            )
        self._reply = RemoteReply(
            self._learned.dialect or OTHER,
            self._options,
            response.url,
            continues=self._before is not None or self._goes_on_answering,
            raw=self._prompt if isinstance(self._prompt, RawPrompt) else None,
        )
        return self._reply

    async def _next_events(self, response: Response, reply: RemoteReply) -> list[Event] | None:
        """What the next item of an answer says; None at its end, or where it has to be cut."""
        if reply.is_over:
            return None
        if not response.is_stream:
            return reply.take_whole(await response.json())
        try:
            item = await response.item()
        except EngineDied:
            # Some close in disorder once they have said why they ended.
            if not reply.has_ended:
                raise
            return None
        if item is None:
            if not reply.has_ended:
                raise EngineDied(f"{response.url} closed the connection in mid-answer")
            return None
        n_before = reply.n_thinking
        events = reply.take(item)
        if reply.n_thinking > n_before and not reply.is_over:
            await self._land(reply)
        return events

    async def _land(self, reply: RemoteReply) -> None:
        """Hold thinking, of which a piece has come, to its budget."""
        if self._landing is None or self._end_was_asked:
            return
        if not self._landing.is_due_after(reply.last_thinking, in_thinking=reply.in_thinking):
            return
        self._end_was_asked = True
        if self._control is Control.CONTINUE:
            reply.is_cut = True
        else:
            await self._ask_control({"action": "reasoning_end"})

    def _take_notices(self) -> Iterator[Event]:
        while self._notices:
            yield Notice(self._notices.popleft())

    def _finish(self, reply: RemoteReply) -> Iterator[Event]:
        learned = self._learned
        learned.thinking_field = reply.thinking_field or learned.thinking_field
        if reply.lacks_usage and not learned.told_no_usage:
            learned.told_no_usage = True
            yield Notice("the endpoint counts no tokens; they are counted here, a piece as one")
        yield from reply.finish(before=self._before)
