"""Work beside the engine: order, cancellation, failures, closing."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from nanorun.errors import EngineError, UsageError
from nanorun.runtime.beside import Beside, Done, Job

Inbox = queue.SimpleQueue[Done[str]]


@pytest.fixture
def inbox() -> Inbox:
    return queue.SimpleQueue()


@pytest.fixture
def beside(inbox: Inbox) -> Iterator[Beside[str]]:
    beside: Beside[str] = Beside(inbox.put)
    yield beside
    beside.close()


def until_unwanted(job: Job[str]) -> None:
    while True:
        job.check()
        threading.Event().wait(0.001)


def test_what_came_first_is_done_first(beside: Beside[str], inbox: Inbox) -> None:
    taken: list[str] = []
    may_go_on = threading.Event()

    def first(job: Job[str]) -> str:
        may_go_on.wait()
        return job.id

    beside.begin("preparing", Job("a"), first, taken.append)
    beside.begin("preparing", Job("b"), lambda job: job.id, taken.append)
    beside.begin("scoring", Job("c"), lambda job: job.id, taken.append)
    beside.take(inbox.get())  # the other kind does not wait
    may_go_on.set()
    beside.take(inbox.get())
    beside.take(inbox.get())
    assert taken == ["c", "a", "b"]


def test_cancelled_work_ends_and_the_next_begins(beside: Beside[str], inbox: Inbox) -> None:
    taken: list[str] = []
    beside.begin("preparing", Job("a"), until_unwanted, lambda _: taken.append("a"))
    beside.begin("preparing", Job("b"), lambda _: "b", taken.append)
    beside.begin("preparing", Job("c"), lambda _: "c", taken.append)
    assert beside.cancel("b")
    assert beside.cancel("a")
    assert not beside.cancel("a")
    beside.take(inbox.get())
    assert taken == ["c"]
    assert inbox.empty()


def test_what_was_cancelled_once_it_was_done_is_not_taken(
    beside: Beside[str], inbox: Inbox
) -> None:
    taken: list[str] = []
    beside.begin("preparing", Job("a"), lambda _: "old", taken.append)
    done = inbox.get()
    beside.cancel("a")
    beside.begin("preparing", Job("a"), lambda _: "new", taken.append)
    beside.take(done)
    assert taken == []
    beside.take(inbox.get())
    assert taken == ["new"]
    assert beside.find("a") is None


@pytest.mark.parametrize(
    ("failure", "shown", "words"),
    [(UsageError("not so"), UsageError, "not so"), (KeyError("x"), EngineError, "KeyError")],
)
def test_failure_is_raised_where_it_is_taken(
    beside: Beside[str], inbox: Inbox, failure: Exception, shown: type[Exception], words: str
) -> None:
    def fail(_: Job[str]) -> None:
        raise failure

    beside.begin("scoring", Job("a"), fail, lambda _: None)
    done = inbox.get()
    with pytest.raises(shown, match=words):
        beside.take(done)


def test_closing_ends_what_is_worked_on_and_what_waits(inbox: Inbox) -> None:
    beside: Beside[str] = Beside(inbox.put)
    for name in ("a", "b"):
        beside.begin("preparing", Job(name), until_unwanted, lambda _: None)
    beside.close()
    assert inbox.empty()
