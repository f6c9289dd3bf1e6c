"""The order in which requests are admitted."""

from __future__ import annotations

import numpy as np

from nanorun.runtime.engine.request import Request
from nanorun.runtime.engine.sequence import Sequence
from nanorun.runtime.engine.waiting import MOST_OVERTAKING, Waiting, may_overtake


def waiting(order: int, n_prompt: int = 10, *, background: bool = False) -> Sequence:
    request = Request(
        f"r{order}", np.zeros(n_prompt, np.int32), (), reply=None, background=background
    )
    return Sequence(request, order)


def test_first_come_first_served_within_a_priority() -> None:
    queue: Waiting[Sequence] = Waiting()
    sequences = [waiting(0, background=True), *(waiting(i) for i in range(1, 200))]
    for sequence in reversed(sequences):
        queue.add(sequence)
    assert list(queue) == [*sequences[1:], sequences[0]]
    head = queue.head()
    assert head == sequences[1 : 1 + len(head)]


def test_suspended_request_comes_before_those_that_came_after_it() -> None:
    queue: Waiting[Sequence] = Waiting()
    sequences = [waiting(i) for i in range(4)]
    for i in (0, 2, 3, 1):
        queue.add(sequences[i])
    queue.remove(sequences[0])
    assert list(queue) == sequences[1:]


def test_only_short_requests_of_the_same_priority_overtake_and_only_so_often() -> None:
    blocked = waiting(0, n_prompt=400)
    assert may_overtake(waiting(1, n_prompt=100), blocked)
    assert not may_overtake(waiting(1, n_prompt=101), blocked)
    assert not may_overtake(waiting(1, n_prompt=100, background=True), blocked)
    blocked.n_overtaken = MOST_OVERTAKING
    assert not may_overtake(waiting(1, n_prompt=100), blocked)
