"""One reply of a remote endpoint: asking, waiting, holding its thinking to a budget, the end."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Self

import httpx

from nanorun.errors import EngineDied, EngineError, NanorunError, UsageError
from nanorun.model.chat import Event, Finished, GenerateOptions, Message, Notice, Usage
from nanorun.runtime.remote.dialect import (
    Control,
    check_options,
    continued_body,
    effort_of,
    hard_cap,
    request_body,
)
from nanorun.runtime.remote.errors import EndpointBusy
from nanorun.runtime.remote.http import Endpoint, wait_before
from nanorun.runtime.remote.reply import DONE, RemoteReply
from nanorun.runtime.remote.sse import SseData, SseDecoder, SseItem
from nanorun.runtime.reply.dial import Phase, ReasoningDial

if TYPE_CHECKING:
    from nanorun.runtime.remote.client import RemoteClient

log = logging.getLogger(__name__)

_CHAT = "chat/completions"
_CONTROL = "chat/completions/control"


class RemoteGeneration:
    """A reply of a `RemoteClient`; see `nanorun.runtime.protocol.Generation`."""

    def __init__(
        self,
        engine: RemoteClient,
        http: Endpoint,
        messages: tuple[Message, ...],
        options: GenerateOptions,
    ) -> None:
        self._engine = engine
        self._http = http
        self._messages = messages
        self._options = options
        self._events: AsyncGenerator[Event, None] | None = None
        self._reading: asyncio.Future[Event] | None = None
        self._reply: RemoteReply | None = None
        self._before: Usage | None = None
        self._dial: ReasoningDial | None = None
        self._budgets: list[int | None] = []
        """Budgets asked for before the endpoint has begun to answer."""
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

    async def finish_thinking(self) -> None:
        """Make it answer soon, where the endpoint can be made to; a notice says where not."""
        if self._can_control():
            if self._engine.dialect.control is Control.BUDGET_ROUTE:
                await self._ask_control({"action": "reasoning_end"})
            elif self._dial is not None:
                self._dial.finish_thinking()
            else:
                self._budgets.append(0)

    async def set_budget(self, n_tokens: int | None) -> None:
        """Change its thinking tokens, where the endpoint allows it; None for no limit."""
        if not self._can_control():
            return
        if self._engine.dialect.control is Control.BUDGET_ROUTE:
            budget = -1 if n_tokens is None else n_tokens
            await self._ask_control({"action": "reasoning_budget", "reasoning_budget": budget})
            return
        cap = hard_cap(self._options) if self._engine.dialect.control is Control.ROUTE else None
        if cap is not None and (n_tokens is None or n_tokens > cap):
            self._notices.append(f"the endpoint holds this reply to {cap} tokens of thinking")
        if self._dial is not None:
            self._dial.set_budget(n_tokens)
        else:
            self._budgets.append(n_tokens)

    def _can_control(self) -> bool:
        if self._done or self._cancelled:
            return False
        if self._reply is not None and self._reply.has_begun and not self._reply.in_thinking:
            return False
        if self._engine.info is not None and self._engine.dialect.control is Control.NONE:
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
            answer = await self._http.post_json(_CONTROL, {"id": completion_id, **action})
        except NanorunError as error:
            self._notices.append(f"its thinking could not be changed: {error.message}")
            return
        if isinstance(answer, Mapping) and answer.get("success") is False:
            log.debug("%s: %s", self._http.address.base, answer.get("message"))

    # --- events -----------------------------------------------------------------------------

    async def _generate(self) -> AsyncGenerator[Event, None]:
        budget = check_options(self._messages, self._options)
        info = await self._engine.start()
        body = request_body(
            self._engine.dialect,
            info.name,
            self._messages,
            self._options,
            thinking_field=self._engine.thinking_field,
        )
        self._settle_effort(body)
        self._set_dial(budget)
        async with aclosing(self._ask(body, continues=False)) as events:
            async for event in events:
                yield event
        reply = self._reply
        assert reply is not None
        if not reply.has_ended and reply.stopped_by is None:
            # The first of two calls was cut off; the answer is still to come.
            self._before = reply.usage()
            rest = continued_body(body, "".join(reply.thinking), reply.n_thinking)
            async with aclosing(self._ask(rest, continues=True)) as events:
                async for event in events:
                    yield event
            reply = self._reply
            assert reply is not None
        if reply.lacks_usage and not self._engine.told_no_usage:
            self._engine.told_no_usage = True
            yield Notice("the endpoint counts no tokens; they are counted here, a piece as one")
        for event in reply.finish(before=self._before):
            yield event

    def _settle_effort(self, body: dict[str, Any]) -> None:
        """An effort is all that some endpoints know of depth, and some not even that."""
        if not self._engine.takes_effort and body.pop("reasoning_effort", None):
            return
        if self._engine.dialect.control is Control.NONE and isinstance(self._options.think, int):
            effort = effort_of(self._options.think)
            self._notices.append(
                f"the endpoint takes no budget of thinking tokens; effort {effort!r} was asked"
            )

    def _set_dial(self, budget: int | None) -> None:
        """Count the thinking here, where the endpoint does not land softly by itself."""
        if self._engine.dialect.control not in (Control.ROUTE, Control.CONTINUE) or budget == 0:
            return
        # The dial forces tokens where it has the engine; here that it wants to is all that counts.
        self._dial = ReasoningDial(
            budget,
            thinking=True,
            close_after_text=(0,),
            close_after_newline=(0,),
            max_reply=self._options.max_tokens,
        )
        for asked in self._budgets:
            self._dial.set_budget(asked)

    async def _ask(
        self, body: Mapping[str, Any], *, continues: bool
    ) -> AsyncGenerator[Event, None]:
        """The events of one call, up to its end or to where its thinking has to be cut."""
        async with aclosing(self._while_busy(body, continues=continues)) as events:
            async for event in events:
                while self._notices:
                    yield Notice(self._notices.popleft())
                yield event
        while self._notices:
            yield Notice(self._notices.popleft())

    async def _while_busy(
        self, body: Mapping[str, Any], *, continues: bool
    ) -> AsyncGenerator[Event, None]:
        """The same; asks again, a few times, while the endpoint takes no request."""
        body, attempt = dict(body), 0
        while True:
            attempt += 1
            try:
                async with (
                    self._http.stream(_CHAT, body) as response,
                    aclosing(self._read(response, continues=continues)) as events,
                ):
                    async for event in events:
                        yield event
                return
            except EndpointBusy as busy:
                wait_s = wait_before(attempt, busy, self._http.settings)
                if wait_s is None:
                    raise
                yield Notice(f"{busy.message}; asking again in {wait_s:.1f} s")
                await asyncio.sleep(wait_s)
            except UsageError as error:
                if not _is_about_effort(error) or not body.pop("reasoning_effort", None):
                    raise
                self._engine.takes_effort = False
                yield Notice("the endpoint takes no reasoning depth; it thinks as it always does")

    async def _read(
        self, response: httpx.Response, *, continues: bool
    ) -> AsyncGenerator[Event, None]:
        url = str(response.url)
        reply = RemoteReply(self._engine.dialect, self._options, url, continues=continues)
        self._reply = reply
        kind = response.headers.get("content-type", "")
        if "json" in kind or "html" in kind:
            for event in await self._whole(response, reply):
                yield event
            return
        try:
            async with aclosing(_items(self._http.pieces(response))) as items:
                async for item in items:
                    n_before = reply.n_thinking
                    for event in reply.take(item):
                        yield event
                    if reply.is_complete or reply.stopped_by is not None:
                        break
                    if reply.n_thinking > n_before and await self._landed(reply):
                        return
        except EngineDied:
            # Some close in disorder once they have said why they ended.
            if not reply.has_ended:
                raise
        self._engine.thinking_field = reply.thinking_field or self._engine.thinking_field
        if not reply.has_ended and reply.stopped_by is None:
            raise EngineDied(f"{url} closed the connection in mid-answer")

    async def _whole(self, response: httpx.Response, reply: RemoteReply) -> list[Event]:
        """The events of an answer that came in one piece, though a stream was asked for."""
        chunk = await self._http.whole(response)
        if not isinstance(chunk, dict) or not (chunk.get("choices") or chunk.get("error")):
            raise EngineError(f"{response.url} does not answer as an OpenAI-style endpoint")
        events = reply.take_chunk(chunk)
        reply.is_complete = True
        return events

    async def _landed(self, reply: RemoteReply) -> bool:
        """Hold thinking to its budget; True if the call has to end for that."""
        if self._dial is None or self._end_was_asked:
            return False
        if self._dial.phase is not Phase.CLOSING:
            piece = reply.last_thinking.encode("utf-8", "replace")
            self._dial.observe(piece, in_thinking=reply.in_thinking)
        if self._dial.phase is not Phase.CLOSING:
            return False
        if self._engine.dialect.control is Control.CONTINUE:
            return True
        self._end_was_asked = True
        await self._ask_control({"action": "reasoning_end"})
        return False


def _is_about_effort(error: UsageError) -> bool:
    return any("reasoning_effort" in fact or "support thinking" in fact for fact in error.facts)


async def _items(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[SseItem, None]:
    decoder = SseDecoder()
    async with aclosing(pieces):
        async for piece in pieces:
            for item in decoder.feed(piece):
                yield item
    for item in decoder.finish():
        # What a broken connection cut in two is no chunk; the end may lack its blank line.
        if isinstance(item, SseData) and (item.text.strip() == DONE or _is_json(item.text)):
            yield item


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
