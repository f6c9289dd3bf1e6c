from __future__ import annotations

import pytest

from nanorun.server.admission import Admission
from nanorun.server.errors import ApiError


def test_admission_counts_places_and_frees_them() -> None:
    admission = Admission(n_parallel=1, max_queued=1)
    with admission.place(), admission.place():
        assert admission.n_active == 2
        with pytest.raises(ApiError) as caught, admission.place():
            pass
    assert caught.value.status == 429
    assert admission.n_active == 0


def test_admission_frees_the_place_of_a_failure() -> None:
    admission = Admission(n_parallel=1, max_queued=0)
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
    admission = Admission(n_parallel=1, max_queued=0)
    with admission.place():
        assert retry_after(admission) == 1
        now += 100.0
    with admission.place():
        assert 10 <= retry_after(admission) <= 60
        now += 10_000.0
    with admission.place():
        assert retry_after(admission) == 60
