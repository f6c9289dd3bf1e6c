"""The local engine: an async client of the child process that runs it.

A child that dies takes its running replies with it and nothing else: they end with `EngineDied`,
and the next request starts a new child.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Self, TypeVar

from nanorun.errors import (
    EngineDied,
    EngineOutOfMemory,
    MemoryPlanError,
    NanorunError,
)
from nanorun.model.chat import (
    EngineStats,
    Event,
    Finished,
    GenerateOptions,
    Message,
    ModelInfo,
    Notice,
    PrefillProgress,
    Prompt,
    PromptTokens,
    RawPrompt,
)
from nanorun.model.engine_options import EngineOptions
from nanorun.model.engine_state import EngineState
from nanorun.model.memory_needs import MemoryNeeds
from nanorun.runtime.memory_watch import MemoryReader, MemoryWatch
from nanorun.runtime.openings import Openings
from nanorun.runtime.process.child import Child
from nanorun.runtime.process.frames import (
    Answer,
    Cancel,
    Detokenize,
    Failed,
    FinishThinking,
    Generate,
    Pieces,
    Progress,
    Render,
    Rendered,
    Request,
    Said,
    Score,
    Scored,
    SetBudget,
    Statistics,
    Stats,
    Tokenize,
    Tokens,
)
from nanorun.runtime.process.machine_memory import MachineMemory
from nanorun.runtime.process.shortage import nearly_spent

A = TypeVar("A", bound=Answer)

# Longer prompts are not begun while memory is all but spent. Cells and states of a sequence have
# their place already; making a prompt, reading it in large batches and saving states along it
# take more.
_LONG_CHARS = 2**16
_CHARS_A_TOKEN = 4


class EngineClient:
    """An engine in a child process.

    Args:
        model: A GGUF file.
        options: How it is opened.
        smaller: What to try, one after the other, when memory runs out: options, and what they
            change in words.
        needs: What each way to open the model takes of main memory; what does not fit is not
            loaded, and memory is watched while it is. Without it, everything counts as fitting.
        memory: Tells how main memory stands.
        keep_alive_s: Idle time after which the model is unloaded; the next request loads it again.
            None to keep it.
    """

    def __init__(
        self,
        model: Path,
        options: EngineOptions | None = None,
        *,
        smaller: Sequence[tuple[EngineOptions, str]] = (),
        needs: MemoryNeeds | None = None,
        memory: MemoryReader | None = None,
        keep_alive_s: float | None = None,
    ) -> None:
        self._model = model
        memory = memory or MachineMemory()
        self._openings = Openings(
            options or EngineOptions(), smaller, needs, read=memory.before_loading
        )
        cushion_bytes = needs.leave_bytes if needs else 0
        self._watch = MemoryWatch(memory, cushion_bytes, self._openings.tell)
        self._keep_alive_s = keep_alive_s
        self._ids = count(1)
        self._child: Child | None = None
        self._opening: Child | None = None
        """The child that loads its model just now."""
        self._info: ModelInfo | None = None
        self._starting = asyncio.Lock()
        self._ended: tuple[float, NanorunError | None] = (time.time(), None)
        """When the model was last unloaded, or could not be loaded, and why."""
        self._idle_timer: asyncio.Task[None] | None = None
        self._n_restarts = 0
        self._has_died = False
        """Whether the next child replaces one that died."""

    @property
    def info(self) -> ModelInfo | None:
        """What the model is; None before the first `start`."""
        return self._info

    @property
    def options(self) -> EngineOptions:
        """How the model is opened now."""
        return self._openings.options

    @property
    def state(self) -> EngineState:
        """What becomes of a request that comes now."""
        if self._opening is not None:
            return EngineState("loading", self._opening.started_at, self._opening.progress)
        child = self._child
        if child is None:
            return self._state_without_model(*self._ended)
        if child.alive:
            return EngineState("ready", child.started_at)
        # It had loaded the model, and died: the next request starts another.
        return self._state_without_model(child.ended_at, child.death)

    def _state_without_model(self, since: float, error: NanorunError | None) -> EngineState:
        reason = None if error is None else error.message
        if isinstance(error, MemoryPlanError | EngineOutOfMemory):
            obstacle = self._openings.obstacle()
            if obstacle is not None:
                return EngineState("failed", since, reason=obstacle)
        elif error is not None and self._child is None:
            return EngineState("failed", since, reason=reason)
        return EngineState("unloaded", since, reason=reason)

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is one."""
        return self._child.pid if self._child and self._child.alive else None

    @property
    def n_restarts(self) -> int:
        """Children that were started after one that died."""
        return self._n_restarts

    async def start(self) -> ModelInfo:
        """Start the child and load the model, smaller if memory does not suffice.

        Raises:
            ModelError: If the file cannot be used.
            MemoryShortage: If what is free now does not suffice; nothing was loaded.
            MemoryPlanError: If the context cannot be allocated.
            EngineDied: If the child ended while loading.
        """
        async with self._starting:
            if self._child is None or not self._child.alive:
                self._has_died = self._has_died or self._child is not None
                try:
                    self._child = await self._start_child()
                except NanorunError as error:
                    self._child, self._ended = None, (time.time(), error)
                    raise
            self._info = self._child.info
            self.rest()
            assert self._info is not None
            return self._info

    async def _start_child(self) -> Child:
        if self._child is not None and isinstance(self._child.death, EngineOutOfMemory):
            self._openings.failed(self._child.death)
        while True:
            # It may ask every process what it holds, which takes a while on a busy machine.
            options = await asyncio.to_thread(self._openings.next)
            child = self._opening = Child()
            self._n_restarts += self._has_died
            self._has_died = False
            try:
                await child.start(self._model, options)
                self._watch.begin(child, options)
                return child
            except (MemoryPlanError, EngineOutOfMemory) as error:
                await child.stop()
                if not self._openings.failed(error, while_loading=True):
                    raise
            except BaseException:
                await child.stop()
                raise
            finally:
                self._opening = None

    async def recover(self, child: Child, error: NanorunError) -> bool:
        """After `child` ran out of memory: end it, so that the next start is a smaller one.

        Returns:
            Whether there is something smaller to try.
        """
        async with self._starting:
            if self._child is not child:  # another reply has seen to it
                return True
            if child.alive:
                await child.stop()
            self._child, self._ended = None, (time.time(), error)
            self._has_died = True
            return self._openings.failed(error)

    async def check_room(self, prompt: Prompt) -> None:
        """Refuse a long prompt while memory is all but spent.

        Raises:
            MemoryShortage: If it is.
        """
        memory = self._watch.memory
        if memory is None or not self._watch.is_nearly_spent:
            return
        n_chars = _n_chars(prompt)
        if n_chars > _LONG_CHARS:
            raise await asyncio.to_thread(nearly_spent, memory.free_bytes, n_chars)

    def take_notice(self) -> str | None:
        """Something the person should know before the next reply, once."""
        notices = self._openings.notices
        return notices.pop(0) if notices else None

    async def close(self) -> None:
        """End the child; replies still running end with `EngineDied`."""
        if self._opening is not None:
            await self._opening.stop()
        async with self._starting:
            if self._idle_timer is not None:  # it does not hold the lock, so it unloads nothing
                self._idle_timer.cancel()
            if self._child is not None:
                await self._child.stop()
            self._child, self._ended = None, (time.time(), None)

    def rest(self) -> None:
        """Begin to count idle time, at the end of anything that kept the engine busy."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._keep_alive_s is not None:
            self._idle_timer = asyncio.create_task(self._unload_after(self._keep_alive_s))

    async def _unload_after(self, idle_s: float) -> None:
        await asyncio.sleep(idle_s)
        async with self._starting:
            if self._child is not None and self._child.idle:
                child, self._child = self._child, None
                self._ended = (time.time(), None)
                await asyncio.shield(child.stop())

    def generate(self, prompt: Prompt, options: GenerateOptions) -> EngineGeneration:
        """Begin a reply; the child is started on first use."""
        return EngineGeneration(self, Generate(self._new_id(), _as_sent(prompt), options))

    async def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; `special` lets control-token texts become control tokens."""
        answer = await self._ask(Tokenize(self._new_id(), text, special), Tokens)
        return list(answer.tokens)

    async def pieces(self, tokens: Sequence[int], *, special: bool = True) -> list[bytes]:
        """The bytes that each token stands for; a character may be shared by several.

        Args:
            tokens: Token ids, shape `(n,)`.
            special: Whether control tokens give their texts; else they give nothing.

        Raises:
            UsageError: If the model has no such token.
        """
        asked = Detokenize(self._new_id(), tuple(tokens), special)
        return list((await self._ask(asked, Pieces)).pieces)

    async def detokenize(self, tokens: Sequence[int], *, special: bool = True) -> str:
        """The text that tokens stand for, as `pieces`; what is no UTF-8 becomes U+FFFD."""
        return b"".join(await self.pieces(tokens, special=special)).decode("utf-8", "replace")

    async def render(self, prompt: Prompt, options: GenerateOptions) -> PromptTokens:
        """What the model would read of a prompt, if it were to answer it with these options.

        Raises:
            UsageError: If the messages, options or tokens make no sense.
            ModelError: If the model's template makes nothing of the messages.
        """
        rendered = await self._render(prompt, options, counts_only=False)
        assert rendered.prompt is not None
        return rendered.prompt

    async def count_tokens(self, prompt: Prompt, options: GenerateOptions) -> int:
        """How many tokens that is; it raises what `render` raises."""
        return (await self._render(prompt, options, counts_only=True)).n_tokens

    async def _render(
        self, prompt: Prompt, options: GenerateOptions, *, counts_only: bool
    ) -> Rendered:
        request = Render(self._new_id(), _as_sent(prompt), options, counts_only)
        return await self._ask(request, Rendered)

    async def stats(self) -> EngineStats:
        """What the engine holds right now."""
        return (await self._ask(Stats(self._new_id()), Statistics)).stats

    async def score(
        self, text: str, n_ctx: int = 512, progress: Callable[[int, int], None] | None = None
    ) -> tuple[int, float]:
        """Predictions scored and perplexity of a text; see `runtime/measure/perplexity.py`."""
        scored = await self._ask(Score(self._new_id(), text, n_ctx), Scored, progress)
        return scored.n_tokens, scored.ppl

    async def _ask(
        self,
        request: Request,
        kind: type[A],
        progress: Callable[[int, int], None] | None = None,
    ) -> A:
        """The answer to a request, which is of class `kind`."""
        child = await self.ready_child()
        try:
            with child.inbox(request.id) as inbox:
                await child.send(request)
                while not isinstance(answer := await inbox.get(), kind):
                    match answer:
                        case Failed(error=error):
                            raise error
                        case Progress(values=values) if progress is not None:
                            progress(*values)
                return answer
        except asyncio.CancelledError:
            with contextlib.suppress(EngineDied):
                await child.send(Cancel(request.id))
            raise
        finally:
            self.rest()

    async def ready_child(self) -> Child:
        """The running child, started if need be."""
        await self.start()
        assert self._child is not None
        return self._child

    def _new_id(self) -> str:
        return f"r{next(self._ids)}"


def _as_sent(prompt: Prompt) -> tuple[Message, ...] | RawPrompt:
    """A prompt as frames hold it."""
    return prompt if isinstance(prompt, RawPrompt) else tuple(prompt)


class EngineGeneration:
    """A reply of an `EngineClient`; see `Generation`."""

    def __init__(self, client: EngineClient, request: Generate) -> None:
        self._client = client
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
            self._child = await self._client.ready_child()
            await self._client.check_room(self._asked.prompt)
            self._inbox = self._stack.enter_context(self._child.inbox(self._id))
            self._attempts += 1
            try:
                for request in self._requests:
                    await self._child.send(request)
            except EngineDied as error:
                return error
        notice = self._client.take_notice()
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
            return await self._client.recover(self._child, error) and not self._has_begun
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
            self._client.rest()


def _n_chars(prompt: Prompt) -> int:
    """About how long a prompt is."""
    if isinstance(prompt, RawPrompt):
        return len(prompt.text or "") + _CHARS_A_TOKEN * len(prompt.tokens or ())
    return sum(len(message.content) + len(message.thinking or "") for message in prompt)
