"""One long job of the engine in a child process, called like a function.

A ggml abort, a kill or a corrupt file ends the child and nothing else: the caller gets `EngineDied`
with what the child said last. A caller that is interrupted lets the job finish its step first, so
that it can keep what it has; a caller that dies takes the child with it.

The child is `python -m nanorun.runtime.process.job`. One `Call` goes in on stdin; `Progress` and at
last `Result` or `Failed` come out on stdout (`frames.py`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from nanorun.errors import EngineDied, EngineOutOfMemory, NanorunError, process_ending
from nanorun.runtime.process import wire
from nanorun.runtime.process.child_main import run_as_child
from nanorun.runtime.process.frames import (
    CALLS,
    JOB_ANSWERS,
    Call,
    Failed,
    JobAnswer,
    Progress,
    Result,
)
from nanorun.runtime.process.last_words import shown
from nanorun.runtime.process.oom import KillCounter, died_of_memory

Report = Callable[..., None]
Job = Callable[[dict[str, Any], Report], Any]
"""A function at the top of a module: JSON in, progress on the way (JSON values), JSON out."""

_ID = "job"
_N_STDERR_LINES = 6
# How long a child goes on that has lost its parent where the kernel does not end it.
_ORPHAN_S = 60.0


def run_job(
    job: Job,
    arguments: dict[str, Any],
    progress: Report | None = None,
    *,
    stop_s: float = 0.0,
    timeout_s: float | None = None,
) -> Any:
    """Call `job(arguments, progress)` in a child process.

    Args:
        job: The function.
        arguments: What it is called with, as JSON can hold it.
        progress: Called with what the job reports.
        stop_s: How long an interrupted job may take to end by itself, before it is killed.
        timeout_s: How long the job may take; None for as long as it takes.

    Raises:
        EngineDied: If the child ended without a result, or took too long.
        NanorunError: What the job raised.
    """
    kills = KillCounter()
    with (
        subprocess.Popen(
            [sys.executable, "-m", "nanorun.runtime.process.job"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # ggml would start a debugger to print a backtrace of an abort.
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        ) as process,
        _killed_after(process, timeout_s) as expired,
    ):  # fmt: skip
        assert process.stdin and process.stdout and process.stderr
        last_lines = _Tail(process.stderr)
        try:
            with contextlib.suppress(BrokenPipeError):
                call = Call(f"{job.__module__}:{job.__qualname__}", arguments)
                process.stdin.write(CALLS.encode(call))
                process.stdin.flush()
            answer = _answer(process.stdout, progress)
        except BaseException:
            _stop(process, stop_s)
            raise
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        code = process.wait()
    if isinstance(answer, Failed):
        raise answer.error
    if answer is not None:
        return answer.value
    last_words = last_lines.wait()
    facts = shown(last_words)
    if expired.is_set():
        raise EngineDied(f"the engine gave no answer in {timeout_s:g} s", facts=facts)
    ending = f"the engine's process {process_ending(code)}"
    if died_of_memory(code, kills, last_words):
        raise EngineOutOfMemory(f"{ending} because memory ran out", facts=facts)
    raise EngineDied(ending, facts=facts)


@contextlib.contextmanager
def _killed_after(
    process: subprocess.Popen[bytes], timeout_s: float | None
) -> Iterator[threading.Event]:
    """Kill a process that still runs after a while; the event tells that this was done."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(timeout_s or 0.0, expire)
    if timeout_s is not None:
        timer.start()
    try:
        yield expired
    finally:
        timer.cancel()


def _answer(stream: Any, progress: Report | None) -> Result | Failed | None:
    """The result or the error; None if the child ends without either."""
    while (body := wire.read(stream)) is not None:
        answer = JOB_ANSWERS.decode(body)
        if not isinstance(answer, Progress):
            return answer
        if progress is not None:
            progress(*answer.values)
    return None


def _stop(process: subprocess.Popen[bytes], stop_s: float) -> None:
    """Tell the child to stop by closing its stdin; make it, when it does not."""
    assert process.stdin is not None and process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        # What it still reports must not fill the pipe.
        threading.Thread(target=process.stdout.read, daemon=True).start()
        process.wait(stop_s)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


class _Tail:
    """The last lines of a stream, read as they come so that its writer never waits."""

    def __init__(self, stream: Any) -> None:
        self._lines: deque[str] = deque(maxlen=_N_STDERR_LINES)
        self._stream = stream
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait(self) -> list[str]:
        """The lines, once the stream has ended."""
        self._thread.join()
        return list(self._lines)

    def _read(self) -> None:
        # The stream is closed under us where the job was interrupted.
        with contextlib.suppress(ValueError, OSError):
            for line in self._stream:
                if text := line.decode("utf-8", "replace").rstrip():
                    self._lines.append(text)


# -- in the child -------------------------------------------------------------------------------


class _StoppedError(BaseException):
    """Raised in the job where it reports progress; no `except Exception` may hold it up."""


class _Reporter:
    """Sends answers, and ends the job once nobody wants its result."""

    def __init__(self, sink: BinaryIO) -> None:
        self._sink = sink
        self.stopping = threading.Event()

    def progress(self, *values: Any) -> None:
        """What the job calls."""
        if self.stopping.is_set():
            raise _StoppedError
        self.send(Progress(_ID, values))

    def send(self, answer: JobAnswer) -> None:
        """Write an answer."""
        try:
            self._sink.write(JOB_ANSWERS.encode(answer))
            self._sink.flush()
        except BrokenPipeError as error:
            raise _StoppedError from error


def _serve(source: BinaryIO, sink: BinaryIO) -> None:
    reporter = _Reporter(sink)
    body = wire.read(source)
    if body is None:
        return

    def listen() -> None:
        source.read()  # nothing more comes: this waits for the end
        reporter.stopping.set()
        threading.Event().wait(_ORPHAN_S)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    with contextlib.suppress(_StoppedError):
        try:
            call = CALLS.decode(body)
            module, _, name = call.job.partition(":")
            job: Job = getattr(importlib.import_module(module), name)
            reporter.send(Result(_ID, job(call.arguments, reporter.progress)))
        except NanorunError as error:
            reporter.send(Failed(_ID, error))


if __name__ == "__main__":
    run_as_child(_serve)
