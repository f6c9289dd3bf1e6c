"""What is loaded when memory is short: figures of memory are made up, nothing is filled."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from nanorun.errors import EngineOutOfMemory, MemoryPlanError, MemoryShortage
from nanorun.model.engine_options import EngineOptions
from nanorun.model.main_memory import MainMemory
from nanorun.model.memory_needs import MemoryNeeds
from nanorun.runtime.openings import Openings
from nanorun.runtime.process.back_off import BackOff
from nanorun.runtime.process.shortage import largest_processes

GIB = 2**30
LARGE = EngineOptions(n_ctx=2**20)
SAME = EngineOptions(n_ctx=2**20, archive_bytes=0)
SMALL = EngineOptions(n_ctx=2**13)
SMALLER = [(SAME, "room for saved prompts 2.0 GiB -> 0 B"), (SMALL, "n_ctx 1,048,576 -> 8,192")]
NEEDS = MemoryNeeds({LARGE: 20 * GIB, SAME: 20 * GIB, SMALL: 17 * GIB}, 16 * GIB, GIB,
                    "nanorun serve nano --n-ctx 8192")  # fmt: skip
KILLED = EngineOutOfMemory("the engine's process was ended by SIGKILL because memory ran out")
REFUSED = MemoryPlanError("a context of 1048576 tokens could not be allocated")


@dataclass
class Machine:
    """Memory and time, as a test says."""

    free_gib: float = 22.0
    now: float = 0.0

    def read(self) -> MainMemory:
        return MainMemory(24 * GIB, int(self.free_gib * GIB))

    def openings(self, needs: MemoryNeeds | None = NEEDS) -> Openings:
        back_off = BackOff(lambda: self.now)
        return Openings(LARGE, SMALLER, needs, read=self.read, back_off=back_off)


def test_what_fits_is_opened_as_wished() -> None:
    openings = Machine().openings()
    assert openings.next() is LARGE
    assert (openings.notices, openings.obstacle()) == ([], None)


def test_what_is_free_may_go_into_half_of_the_cushion() -> None:
    assert Machine(free_gib=20.5).openings().next() is LARGE
    assert Machine(free_gib=20.4).openings().next() is SMALL


def test_smaller_plan_is_opened_while_others_take_memory_and_the_wished_one_afterwards() -> None:
    machine = Machine(free_gib=18)
    openings = machine.openings()
    assert openings.next() is SMALL
    assert openings.options is SMALL
    (notice,) = openings.notices
    assert notice.startswith("other programs take memory, so the model was opened smaller: ")
    assert "n_ctx 1,048,576 -> 8,192" in notice
    machine.free_gib = 22
    assert openings.next() is LARGE
    assert len(openings.notices) == 1


def test_nothing_is_opened_that_does_not_fit() -> None:
    machine = Machine(free_gib=15)
    openings = machine.openings()
    with pytest.raises(MemoryShortage) as caught:
        openings.next()
    error = caught.value
    assert error.message == (
        "the model needs 17.0 GiB of main memory, but 15.0 GiB are free,"
        " of which 1.0 GiB are to be left to other programs"
    )
    assert "its weights alone take 16.0 GiB" in error.facts
    assert any(fact.startswith("most is held by ") for fact in error.facts)
    assert error.tries == ()  # whatever is left to others, it does not fit
    assert error.retry_after_s == 10
    assert openings.obstacle() == error.message
    machine.free_gib = 22  # the other program has ended
    assert openings.obstacle() is None
    assert openings.next() is LARGE


def test_cushion_that_alone_is_in_the_way_is_named() -> None:
    with pytest.raises(MemoryShortage) as caught:
        Machine(free_gib=17.5 - 2**-10).openings().next()
    assert caught.value.tries == ()
    needs = MemoryNeeds(NEEDS.planned_bytes, 16 * GIB, 4 * GIB, NEEDS.again)
    with pytest.raises(MemoryShortage) as caught:
        Machine(free_gib=18).openings(needs).next()
    assert caught.value.tries == ("nanorun serve nano --n-ctx 8192 --leave 512M",)


def test_kill_is_followed_by_a_smaller_one_at_once() -> None:
    openings = Machine().openings()
    openings.next()
    assert openings.failed(KILLED)
    assert openings.next() is SAME
    (notice,) = openings.notices
    assert notice.startswith("memory ran out, so the model was opened smaller: room for saved")


def test_kill_while_loading_is_not_followed_by_one_that_takes_as_much() -> None:
    openings = Machine().openings()
    openings.next()
    assert openings.failed(KILLED, while_loading=True)
    assert openings.next() is SMALL
    assert ", then n_ctx 1,048,576 -> 8,192" in openings.notices[0]


def test_kill_is_not_followed_by_one_that_does_not_fit() -> None:
    """Seen at full size: a machine that is full was given 17 GiB to load again and again."""
    machine = Machine()
    openings = machine.openings()
    openings.next()
    machine.free_gib = 15
    assert openings.failed(KILLED)
    for _ in range(3):
        with pytest.raises(MemoryShortage, match=r"but 15\.0 GiB are free"):
            openings.next()
    assert openings.notices == []
    machine.free_gib = 22
    assert openings.next() is SAME


def test_kills_one_after_the_other_are_waited_for() -> None:
    machine = Machine()
    openings = machine.openings()
    for _ in range(2):
        openings.next()
        openings.failed(KILLED)
    with pytest.raises(MemoryShortage, match="memory ran out 2 times") as caught:
        openings.next()
    assert caught.value.retry_after_s == 5
    assert openings.obstacle() == caught.value.message
    machine.now += 5
    assert openings.next() is SMALL
    assert not openings.failed(KILLED)  # nothing is smaller
    machine.now += 5
    with pytest.raises(MemoryShortage, match="memory ran out 3 times"):
        openings.next()
    machine.now += 5
    assert openings.next() is SMALL


def test_context_that_is_refused_costs_no_wait_as_long_as_there_are_smaller_ones() -> None:
    openings = Machine().openings()
    for expected in (LARGE, SAME, SMALL):
        assert openings.next() is expected
        openings.failed(REFUSED, while_loading=True)
    assert len(openings.notices) == 2


def test_without_figures_everything_fits() -> None:
    openings = Machine(free_gib=0).openings(None)
    assert openings.next() is LARGE
    assert openings.obstacle() is None
    assert openings.failed(KILLED, while_loading=True)
    assert openings.next() is SAME


def test_largest_processes_are_told_by_name_and_size() -> None:
    found = largest_processes(2)
    assert len(found) == 2
    assert all(line.endswith(("GiB", "MiB")) and "(" in line for line in found)
