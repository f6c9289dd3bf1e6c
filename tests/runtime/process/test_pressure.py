"""When memory is given back and taken again: a machine in figures, second by second."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from nanorun.runtime.process.machine_memory import MemoryNow
from nanorun.runtime.process.pressure import Pressure, Spare

MIB = 2**20
GIB = 2**30
CUSHION = GIB
PLANNED = 4 * GIB


@dataclass
class Machine:
    """An engine that fills whatever it may hold within some seconds, and other programs."""

    others_bytes: int = 0
    total_bytes: int = 8 * GIB
    spare: Spare = field(default_factory=lambda: Spare(PLANNED, PLANNED, PLANNED))
    pressure: Pressure = field(default_factory=lambda: Pressure(CUSHION))
    fills_bytes_a_s: int = 200 * MIB
    now_s: int = 1000
    stalled: float = 0.0
    n_taken: int = 0
    n_given: int = 0
    n_episodes: int = 0

    @property
    def free_bytes(self) -> int:
        return max(0, self.total_bytes - self.spare.held_bytes - self.others_bytes)

    def second(self) -> int:
        """Let a second pass; returns what the engine was told to change."""
        self.now_s += 1
        was_in_episode = self.pressure.in_episode
        memory = MemoryNow(self.free_bytes, self.stalled)
        change = self.pressure.update(memory, self.spare, self.now_s)
        self.n_episodes += self.pressure.in_episode and not was_in_episode
        limit, held = self.spare.limit_bytes, self.spare.held_bytes
        if change < 0:
            self.n_given += 1
            limit = held = max(0, held + change)
        elif change > 0:
            self.n_taken += 1
            limit = min(PLANNED, limit + change)
        held = min(limit, held + self.fills_bytes_a_s)
        self.spare = Spare(PLANNED, limit, held)
        return change

    def seconds(self, n: int) -> None:
        for _ in range(n):
            self.second()


def test_nothing_is_done_while_memory_suffices() -> None:
    machine = Machine(others_bytes=3 * GIB + 200 * MIB)  # more than half of the cushion is left
    machine.seconds(600)
    assert (machine.n_given, machine.n_taken, machine.n_episodes) == (0, 0, 0)
    assert not machine.pressure.is_short


def test_what_is_missing_of_the_cushion_is_given_back_at_once() -> None:
    machine = Machine(others_bytes=3 * GIB + 600 * MIB)
    assert machine.free_bytes == 424 * MIB
    assert machine.second() == -600 * MIB
    assert machine.pressure.is_short
    assert machine.second() == 0
    assert not machine.pressure.is_short
    machine.seconds(300)
    assert machine.free_bytes >= CUSHION
    assert (machine.n_given, machine.n_taken, machine.n_episodes) == (1, 0, 1)


def test_all_is_taken_again_slowly_once_others_have_ended() -> None:
    machine = Machine(others_bytes=7 * GIB + 1)
    machine.seconds(20)
    assert machine.spare.limit_bytes == 0
    machine.others_bytes = 0
    machine.seconds(28)
    assert machine.n_taken == 0
    limits = []
    while machine.pressure.in_episode:
        machine.second()
        limits.append(machine.spare.limit_bytes)
        assert machine.free_bytes >= CUSHION
    assert limits == sorted(limits)
    assert machine.n_taken == 8 and len(limits) >= 70
    assert machine.spare.limit_bytes == PLANNED
    assert machine.n_episodes == 1


def test_only_so_much_is_taken_again_as_leaves_the_cushion() -> None:
    machine = Machine(others_bytes=7 * GIB)
    machine.seconds(20)
    machine.others_bytes = 5 * GIB
    machine.seconds(3600)
    assert machine.n_episodes == 1
    n_given = machine.n_given
    assert 0 < machine.spare.limit_bytes <= 2 * GIB
    assert machine.free_bytes >= CUSHION
    machine.seconds(3600)
    assert machine.n_given == n_given


def test_others_that_come_and_go_are_given_way_to_ever_longer() -> None:
    """A build every two minutes: it must not be fought for its memory each time."""
    machine = Machine()
    times = []
    for _ in range(60):
        n_given = machine.n_given
        machine.others_bytes = 7 * GIB
        machine.seconds(60)
        machine.others_bytes = 2 * GIB
        machine.seconds(60)
        if machine.n_given > n_given:
            times.append(machine.now_s)
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert waits == sorted(waits)
    assert waits[-1] >= 600
    assert machine.n_episodes <= 3  # people were not told each time
    machine.seconds(700)
    assert machine.spare.limit_bytes > 0  # once they have ended, it comes back


def test_rest_that_cannot_be_given_back_is_not_asked_for() -> None:
    machine = Machine(others_bytes=8 * GIB)
    machine.seconds(100)
    assert machine.spare.limit_bytes == 0
    assert machine.second() == 0
    assert machine.pressure.is_short and machine.pressure.is_critical


@pytest.mark.parametrize(
    ("free_bytes", "is_short", "is_critical"),
    [
        (CUSHION, False, False),
        (CUSHION // 2, False, False),
        (CUSHION // 2 - 1, True, False),
        (CUSHION // 4, True, False),
        (CUSHION // 4 - 1, True, True),
        (0, True, True),
    ],
)
def test_how_short_it_is(free_bytes: int, is_short: bool, is_critical: bool) -> None:
    pressure = Pressure(CUSHION)
    pressure.update(MemoryNow(free_bytes), Spare(PLANNED, PLANNED, PLANNED), 0.0)
    assert (pressure.is_short, pressure.is_critical) == (is_short, is_critical)


def test_processes_that_wait_for_memory_are_given_some_now_and_then() -> None:
    machine = Machine(others_bytes=3 * GIB, stalled=0.3, fills_bytes_a_s=0)
    assert machine.second() == -CUSHION // 2
    assert [machine.second() for _ in range(9)] == [0] * 9  # the figure is of ten seconds
    assert machine.second() == -CUSHION // 2


def test_processes_elsewhere_that_wait_for_memory_are_no_matter_where_there_is_plenty() -> None:
    machine = Machine(stalled=0.9)
    machine.seconds(100)
    assert (machine.n_given, machine.n_episodes) == (0, 0)


def test_without_a_cushion_nothing_is_done() -> None:
    machine = Machine(others_bytes=4 * GIB, stalled=0.9, pressure=Pressure(0))
    machine.seconds(100)
    assert (machine.free_bytes, machine.n_given) == (0, 0)
