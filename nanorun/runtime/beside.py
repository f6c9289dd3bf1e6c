"""Work beside the engine: its streams go on while long prompts are prepared and texts are scored.

Work of one kind is done one after the other, in the order in which it came. What is done is taken
up by the engine's thread, which alone calls the methods here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Literal, TypeVar

from nanorun.errors import EngineError, NanorunError

log = logging.getLogger(__name__)

T = TypeVar("T")
C = TypeVar("C")
Kind = Literal["preparing", "scoring"]


class Unwanted(Exception):
    """Nobody waits for this work any more; not an error."""


@dataclass(eq=False, slots=True)
class Job(Generic[C]):
    """Something that is worked on for a request."""

    id: str
    """The request's."""
    controls: list[C] = field(default_factory=list)
    """What was asked of the request meanwhile, for when it is ready."""
    is_unwanted: bool = False

    def check(self) -> None:
        """Called by the work now and then.

        Raises:
            Unwanted: If it is to end.
        """
        if self.is_unwanted:
            raise Unwanted


@dataclass(frozen=True, eq=False, slots=True)
class Done(Generic[C]):
    """A job whose work has ended."""

    job: Job[C]
    finish: Callable[[], None]
    """Takes up what came out, or raises what went wrong; for the engine's thread."""

    @property
    def id(self) -> str:
        """The request's."""
        return self.job.id


class Beside(Generic[C]):
    """The jobs that are worked on or wait for it.

    Args:
        report: Told of each job that is done, in the thread that did it.
    """

    def __init__(self, report: Callable[[Done[C]], None]) -> None:
        self._report = report
        self._threads: dict[Kind, ThreadPoolExecutor] = {
            "preparing": ThreadPoolExecutor(1, thread_name_prefix="preparing"),
            "scoring": ThreadPoolExecutor(1, thread_name_prefix="scoring"),
        }
        self._jobs: dict[str, Job[C]] = {}

    def begin(
        self, kind: Kind, job: Job[C], work: Callable[[Job[C]], T], take: Callable[[T], None]
    ) -> None:
        """Work on something once those of its kind that came before are done.

        Args:
            kind: Whose thread does it.
            job: Whose work it is.
            work: Does it, in that thread.
            take: Takes up what `work` returned, in the engine's thread.
        """

        def run() -> None:
            try:
                job.check()
                finish = partial(take, work(job))
            except Unwanted:
                return
            except NanorunError as error:
                finish = partial(_refuse, error)
            except Exception as error:  # nobody else would say so, and the request would wait
                log.exception("%s failed", kind)
                finish = partial(_refuse, EngineError(f"{kind} the request failed: {error!r}"))
            self._report(Done(job, finish))

        self._jobs[job.id] = job
        self._threads[kind].submit(run)

    def find(self, request_id: str) -> Job[C] | None:
        """The job of a request, until it is taken up."""
        return self._jobs.get(request_id)

    def take(self, done: Done[C]) -> None:
        """Finish a job, unless it was cancelled when it was done already."""
        if self._jobs.get(done.id) is done.job:
            del self._jobs[done.id]
            done.finish()

    def cancel(self, request_id: str) -> bool:
        """End the job of a request soon, and let nothing come of it; whether there was one."""
        job = self._jobs.pop(request_id, None)
        if job is not None:
            job.is_unwanted = True
        return job is not None

    def close(self) -> None:
        """End all jobs, and wait until they have: they may use the model."""
        for request_id in tuple(self._jobs):
            self.cancel(request_id)
        for thread in self._threads.values():
            thread.shutdown(cancel_futures=True)


def _refuse(error: NanorunError) -> None:
    raise error
