from __future__ import annotations

from contextlib import ExitStack

import pytest

from nanorun.server.admission import Admission
from nanorun.server.errors import ApiError
from nanorun.server.settings import ServerSettings


def test_admission_counts_places_and_frees_them() -> None:
    admission = Admission(ServerSettings(n_parallel=1, max_queued=1))
    with admission.place(), admission.place():
        assert admission.n_active == 2
        with pytest.raises(ApiError) as caught, admission.place():
            pass
    assert caught.value.status == 429
    assert admission.n_active == 0


def test_admission_frees_the_place_of_a_failure() -> None:
    admission = Admission(ServerSettings(n_parallel=1, max_queued=0))
    with pytest.raises(ZeroDivisionError), admission.place():
        raise ZeroDivisionError
    admission.check()


def retry_after(admission: Admission) -> int:
    with pytest.raises(ApiError) as caught:
        admission.check()
    return int(caught.value.headers["Retry-After"])


def test_admission_guesses_longer_waits_from_longer_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("nanorun.server.admission.time.monotonic", lambda: now)
    admission = Admission(ServerSettings(n_parallel=1, max_queued=0))
    with admission.place():
        assert retry_after(admission) == 1
        now += 100.0
    with admission.place():
        assert 10 <= retry_after(admission) <= 60
        now += 10_000.0
    with admission.place():
        assert retry_after(admission) == 60


def test_admission_guesses_by_the_pace_not_by_the_time_in_the_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("nanorun.server.admission.time.monotonic", lambda: now)
    admission = Admission(ServerSettings(n_parallel=1, max_queued=9))
    with ExitStack() as all_places:
        places = [all_places.enter_context(ExitStack()) for _ in range(10)]
        for place in places:
            place.enter_context(admission.place())
        for place in places[:5]:  # one ends every 3 seconds, though the last one waits for 15
            now += 3
            place.close()
        for _ in range(5):
            all_places.enter_context(admission.place())
        assert retry_after(admission) == 3


def test_admission_does_not_count_idle_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("nanorun.server.admission.time.monotonic", lambda: now)
    admission = Admission(ServerSettings(n_parallel=1, max_queued=0))
    for _ in range(3):
        with admission.place():
            now += 2
        now += 1000
    with admission.place():
        assert retry_after(admission) == 2


def test_admission_bounds_the_bodies_that_wait() -> None:
    admission = Admission(ServerSettings(max_queued_bytes=100))
    with admission.place(n_bytes=1000) as first:  # nobody is before it
        with pytest.raises(ApiError, match="--max-queued-size") as caught:
            admission.check(n_bytes=1)
        assert caught.value.status == 429
        first.begin()
        with admission.place(n_bytes=60), pytest.raises(ApiError):
            admission.check(n_bytes=60)
        admission.check(n_bytes=60)


def test_admission_knows_who_waits() -> None:
    admission = Admission(ServerSettings())
    with admission.place(3) as place:
        assert (admission.n_active, admission.n_waiting) == (3, 3)
        place.begin()
        assert (admission.n_active, admission.n_waiting) == (3, 2)
    assert (admission.n_active, admission.n_waiting) == (0, 0)
