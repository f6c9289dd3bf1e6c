"""Keeps one engine's process: starts it, smaller where memory does not suffice, and unloads it.

A child that dies takes its running replies with it and nothing else: the next request starts a new
one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from nanorun.errors import EngineOutOfMemory, MemoryPlanError, NanorunError
from nanorun.model.chat import ModelInfo, Prompt, RawPrompt
from nanorun.model.engine_options import EngineOptions
from nanorun.model.engine_state import EngineState
from nanorun.model.memory_needs import MemoryNeeds
from nanorun.runtime.memory_watch import MemoryReader, MemoryWatch
from nanorun.runtime.openings import Openings
from nanorun.runtime.process.child import Child
from nanorun.runtime.process.machine_memory import MachineMemory
from nanorun.runtime.process.shortage import nearly_spent

# Longer prompts are not begun while memory is all but spent. Cells and states of a sequence have
# their place already; making a prompt, reading it in large batches and saving states along it
# take more.
_LONG_CHARS = 2**16
_CHARS_A_TOKEN = 4


class EngineKeeper:
    """The child process of one model, whether it is there just now or not.

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

    async def ready_child(self) -> Child:
        """The running child, started if need be."""
        await self.start()
        assert self._child is not None
        return self._child


def _n_chars(prompt: Prompt) -> int:
    """About how long a prompt is."""
    if isinstance(prompt, RawPrompt):
        return len(prompt.text or "") + _CHARS_A_TOKEN * len(prompt.tokens or ())
    return sum(len(message.content) + len(message.thinking or "") for message in prompt)
