from __future__ import annotations

from nanorun.runtime.process.back_off import BackOff


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_waits_double_after_the_first_failure_up_to_a_limit() -> None:
    clock = Clock()
    back_off = BackOff(clock)
    assert back_off.wait_s() == 0
    waits = []
    for _ in range(9):
        back_off.failed()
        waits.append(back_off.wait_s())
        clock.now += waits[-1]
        assert back_off.wait_s() == 0
    assert waits == [0, 5, 10, 20, 40, 80, 160, 300, 300]


def test_wait_passes_with_time() -> None:
    clock = Clock()
    back_off = BackOff(clock)
    back_off.failed()
    back_off.failed()
    clock.now += 3
    assert back_off.wait_s() == 2


def test_failure_of_long_ago_is_forgotten() -> None:
    clock = Clock()
    back_off = BackOff(clock)
    for _ in range(4):
        back_off.failed()
    clock.now += 601
    back_off.failed()
    assert (back_off.n_failures, back_off.wait_s()) == (1, 0)
