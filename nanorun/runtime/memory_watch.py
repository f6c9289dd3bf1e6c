"""Watches main memory while a model is loaded, and lets the engine give back what is spare."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from nanorun.errors import EngineError
from nanorun.model.engine_options import EngineOptions
from nanorun.model.main_memory import MainMemory
from nanorun.model.units import format_gib
from nanorun.runtime.process.child import Child
from nanorun.runtime.process.machine_memory import MemoryNow
from nanorun.runtime.process.pressure import Pressure, Spare

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0


class MemoryReader(Protocol):
    """Tells how memory stands; `MachineMemory` reads the real one."""

    def before_loading(self) -> MainMemory:
        """What a new process could take."""

    def beside(self, pid: int) -> MemoryNow:
        """What is free beside an engine's process."""


class MemoryWatch:
    """Looks about once a second.

    Args:
        reader: Where to look.
        cushion_bytes: What is to be left to other programs.
        tell: Takes what the person should know.
        clock: Seconds, as `time.monotonic`.
        look_every_s: Seconds between two looks.
    """

    def __init__(
        self,
        reader: MemoryReader,
        cushion_bytes: int,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        look_every_s: float = _LOOK_EVERY_S,
    ) -> None:
        self._reader = reader
        self._pressure = Pressure(cushion_bytes)
        self._tell = tell
        self._clock = clock
        self._look_every_s = look_every_s
        self._spare = Spare(0, 0, 0)
        self._watching: asyncio.Task[None] | None = None
        self._changing: asyncio.Task[None] | None = None
        self.memory: MemoryNow | None = None
        """The last reading; None without a model."""

    @property
    def is_nearly_spent(self) -> bool:
        """Whether little memory is left, and nothing that could be given back."""
        is_critical = self.memory is not None and self._pressure.is_critical
        return is_critical and not self._spare.limit_bytes

    def begin(self, child: Child, options: EngineOptions) -> None:
        """Watch as long as a process lives, which has just loaded its model."""
        planned = options.checkpoint_bytes + options.archive_bytes
        self._spare = Spare(planned, planned, 0)
        self._watching = asyncio.create_task(self._watch(child))

    async def _watch(self, child: Child) -> None:
        try:
            while await child.outlives(self._look_every_s):
                self._look(child)
        finally:
            self.memory = None

    def _look(self, child: Child) -> None:
        assert child.pid is not None
        self.memory = self._reader.beside(child.pid)
        if self._changing is not None and not self._changing.done():
            return  # it is in a long batch
        was_in_episode = self._pressure.in_episode
        n_bytes = self._pressure.update(self.memory, self._spare, self._clock())
        child.memory_is_short = self._pressure.is_short
        is_new = self._pressure.in_episode and not was_in_episode
        if n_bytes:
            change = self._change(child, n_bytes, self.memory if is_new else None)
            self._changing = asyncio.create_task(change)
        elif is_new:
            self._tell_of(self.memory, freed_bytes=0)

    async def _change(self, child: Child, n_bytes: int, told_of: MemoryNow | None) -> None:
        try:
            answer = await child.change_spare(n_bytes)
        except EngineError:
            return  # it has ended, and who asked it for something is told
        self._spare = Spare(self._spare.planned_bytes, answer.limit_bytes, answer.held_bytes)
        log.info("%+d bytes for what can be made again: %s", n_bytes, self._spare)
        if told_of is not None:
            self._tell_of(told_of, answer.freed_bytes)

    def _tell_of(self, memory: MemoryNow, freed_bytes: int) -> None:
        what = f"memory is short ({format_gib(memory.free_bytes)} left)"
        if freed_bytes:
            self._tell(f"{what}: saved prompts of {format_gib(freed_bytes)} were given back")
        else:
            self._tell(f"{what}, and nothing is held that could be given back")
