"""The watch over memory: a child, a reader and a clock that do as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from nanorun.errors import EngineDied
from nanorun.model.engine_options import EngineOptions
from nanorun.model.main_memory import MainMemory
from nanorun.runtime.memory_watch import MemoryWatch
from nanorun.runtime.process.frames import SpareChanged
from nanorun.runtime.process.machine_memory import MemoryNow
from tests.support.waiting import become

MIB = 2**20
GIB = 2**30
OPTIONS = EngineOptions(checkpoint_bytes=GIB, archive_bytes=3 * GIB)
PLANNED = 4 * GIB


class FakeChild:
    """Holds as much as it may, and gives back what it is told to."""

    pid = 4242

    def __init__(self) -> None:
        self.is_alive = True
        self.memory_is_short = False
        self.limit = self.held = PLANNED
        self.changes: list[int] = []
        self.in_long_batch: asyncio.Event | None = None

    async def outlives(self, _wait_s: float) -> bool:
        await asyncio.sleep(0)
        return self.is_alive

    async def change_spare(self, n_bytes: int) -> SpareChanged:
        self.changes.append(n_bytes)
        if self.in_long_batch is not None:
            await self.in_long_batch.wait()
        if not self.is_alive:
            raise EngineDied("the engine's process was ended by SIGKILL")
        before = self.held
        base = self.held if n_bytes < 0 else self.limit
        self.limit = self.held = max(0, min(PLANNED, base + n_bytes))
        return SpareChanged("spare", self.held, self.limit, max(0, before - self.held))


class Scene:
    """A watch over a child."""

    def __init__(self) -> None:
        self.free_bytes = 8 * GIB
        self.now_s = 0.0
        self.n_looks = 0
        self.told: list[str] = []
        self.child: Any = FakeChild()
        self.watch = MemoryWatch(self, GIB, self.told.append, self.clock, look_every_s=0)
        self.watch.begin(self.child, OPTIONS)

    def clock(self) -> float:
        self.now_s += 1
        return self.now_s

    def before_loading(self) -> MainMemory:
        raise AssertionError("nothing is loaded")

    def beside(self, pid: int) -> MemoryNow:
        assert pid == self.child.pid
        self.n_looks += 1
        return MemoryNow(self.free_bytes)

    async def look(self, n: int = 2) -> None:
        n_looks = self.n_looks + n
        await become(lambda: self.n_looks >= n_looks)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    scene = Scene()
    yield scene
    scene.child.is_alive = False
    await become(lambda: scene.watch.memory is None)


async def test_nothing_is_asked_while_memory_suffices(scene: Scene) -> None:
    await scene.look(50)
    assert (scene.child.changes, scene.told) == ([], [])
    assert not scene.child.memory_is_short


async def test_what_is_missing_is_given_back_and_told_once(scene: Scene) -> None:
    scene.free_bytes = 400 * MIB
    await become(lambda: scene.told)
    assert scene.child.changes[0] == -624 * MIB
    assert scene.child.memory_is_short
    await become(lambda: scene.child.held == 0)  # it changes nothing of the figure
    await scene.look(20)
    assert scene.told == [
        "memory is short (400.0 MiB left): saved prompts of 624.0 MiB were given back"
    ]
    assert not scene.watch.is_nearly_spent
    scene.free_bytes = 100 * MIB
    await become(lambda: scene.watch.is_nearly_spent)


async def test_all_may_be_held_again_once_memory_is_free(scene: Scene) -> None:
    scene.free_bytes = 0
    await become(lambda: scene.child.limit == 0)
    scene.free_bytes = 8 * GIB
    await become(lambda: scene.child.limit == PLANNED)
    assert len(scene.told) == 1
    assert not scene.child.memory_is_short
    assert not scene.watch.is_nearly_spent


async def test_engine_in_a_long_batch_is_asked_once(scene: Scene) -> None:
    scene.child.in_long_batch = asyncio.Event()
    scene.free_bytes = 0
    await scene.look(50)
    assert len(scene.child.changes) == 1
    scene.child.in_long_batch.set()
    await become(lambda: scene.child.held == 0)


async def test_engine_that_dies_when_asked_is_no_failure_of_the_watch(scene: Scene) -> None:
    scene.child.in_long_batch = asyncio.Event()
    scene.free_bytes = 0
    await become(lambda: scene.child.changes)
    scene.child.is_alive = False
    scene.child.in_long_batch.set()
    await become(lambda: scene.watch.memory is None)
    assert not scene.watch.is_nearly_spent
    assert scene.told == []


async def test_next_engine_begins_with_all_that_is_planned(scene: Scene) -> None:
    scene.free_bytes = 0
    await become(lambda: scene.child.limit == 0)
    scene.child.is_alive = False
    await become(lambda: scene.watch.memory is None)
    scene.child = FakeChild()
    scene.watch.begin(scene.child, OPTIONS)
    assert not scene.watch.is_nearly_spent
    await become(lambda: scene.child.limit == 0)
    assert len(scene.told) == 1  # memory was short all the time


async def test_engine_that_has_nothing_spare_is_told_of_as_such() -> None:
    scene = Scene()
    scene.child.is_alive = False
    await become(lambda: scene.watch.memory is None)
    scene.child = FakeChild()
    scene.watch.begin(scene.child, EngineOptions(checkpoint_bytes=0, archive_bytes=0))
    scene.free_bytes = 10 * MIB
    await become(lambda: scene.told)
    assert scene.told == [
        "memory is short (10.0 MiB left), and nothing is held that could be given back"
    ]
    assert scene.child.changes == []
    scene.child.is_alive = False
    await become(lambda: scene.watch.memory is None)
