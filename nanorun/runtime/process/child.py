"""The engine's process as its client holds it: starting, asking, watching, burying it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from nanorun.errors import EngineDied, EngineError, EngineOutOfMemory, process_ending
from nanorun.model.chat import ModelInfo
from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.process import wire
from nanorun.runtime.process.frames import (
    ANSWERS,
    REQUESTS,
    Answer,
    ChangeSpare,
    Close,
    Failed,
    Open,
    Ping,
    Pong,
    Progress,
    Ready,
    Request,
    SpareChanged,
)
from nanorun.runtime.process.last_words import shown
from nanorun.runtime.process.oom import KillCounter, died_of_memory

_SPARE = "spare"
_N_STDERR_LINES = 40
_MOST_LINE_BYTES = 2000
# The answers to several requests of one batch, and more, come in one read.
_READ_BYTES = 2**16
# A long conversation's state is written at the end; that takes seconds on a slow disk.
_CLOSE_TIMEOUT_S = 15.0
# The child's reader thread answers even while a batch is evaluated or a model loaded.
HEARTBEAT_S = 10.0
SILENCE_LIMIT_S = 60.0
# No single batch takes this long; one that does hangs in native code.
STUCK_LIMIT_S = 1800.0


class Child:
    """One child process and the queues of those who wait for its answers."""

    def __init__(self) -> None:
        self.info: ModelInfo | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._inboxes: dict[str, asyncio.Queue[Answer]] = {}
        self._stderr: deque[str] = deque(maxlen=_N_STDERR_LINES)
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._hung: str | None = None
        self._n_heard = 0
        self._n_steps = -1
        self._stuck_s = 0.0
        self.started_at = time.time()
        """Seconds since the epoch; once the model is loaded, when it was."""
        self.ended_at = 0.0
        self.progress = 0.0
        """The part of the weights that is read, 0 to 1."""
        self.memory_is_short = False
        """Whether main memory was nearly spent when somebody last looked."""
        self._kills: KillCounter | None = None
        self.death: EngineDied | None = None
        """How it ended, once it has."""

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return self._process is not None and self.death is None

    @property
    def stopping(self) -> bool:
        """Whether it ends because it was told to."""
        return self._stopping

    @property
    def pid(self) -> int | None:
        """Its process id."""
        return self._process.pid if self._process else None

    @property
    def idle(self) -> bool:
        """Whether nobody waits for an answer, but for those who watch over memory."""
        return not self._inboxes.keys() - {_SPARE}

    async def start(self, model: Path, options: EngineOptions) -> None:
        """Spawn it and wait until the model is loaded."""
        self._kills = KillCounter()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "nanorun.runtime.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # ggml would start a debugger to print a backtrace of an abort.
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )  # fmt: skip
        if self._stopping:  # told so meanwhile
            self._process.kill()
        self._tasks = [
            asyncio.create_task(self._read_frames()),
            asyncio.create_task(self._read_stderr()),
            asyncio.create_task(self._watch()),
        ]
        with self.inbox("open") as inbox:
            await self.send(Open("open", str(model), options))
            while isinstance(answer := await inbox.get(), Progress):
                (self.progress,) = answer.values
        if isinstance(answer, Failed):
            raise answer.error
        assert isinstance(answer, Ready)
        self.info = answer.info
        self.started_at = time.time()

    async def stop(self) -> None:
        """Ask it to close, then make it; one that has not opened its model has nothing to keep."""
        self._stopping = True
        process = self._process
        if process is not None and process.returncode is None:
            timeout_s = _CLOSE_TIMEOUT_S if self.info is not None else 0.0
            try:
                async with asyncio.timeout(timeout_s):
                    with contextlib.suppress(EngineDied):
                        await self.send(Close("close"))
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        for task in self._tasks:
            await task
        if process is not None and process.stdin is not None:
            process.stdin.close()

    @contextlib.contextmanager
    def inbox(self, request_id: str) -> Iterator[asyncio.Queue[Answer]]:
        """A queue of the answers to one request, for the time of a `with` block.

        Raises:
            EngineDied: If the process is gone; if it goes later, the last answer is that failure.
        """
        if self.death is not None:
            raise self.death
        queue: asyncio.Queue[Answer] = asyncio.Queue()
        self._inboxes[request_id] = queue
        try:
            yield queue
        finally:
            del self._inboxes[request_id]

    async def send(self, request: Request) -> None:
        """Write a request.

        Raises:
            EngineDied: If the process is gone.
            EngineError: If the request is larger than a frame may be.
        """
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(REQUESTS.encode(request))
            await self._process.stdin.drain()
        except (ConnectionError, RuntimeError) as error:
            await asyncio.wait({self._tasks[0]})  # it learns how the process ended
            assert self.death is not None
            raise self.death from error

    async def change_spare(self, n_bytes: int) -> SpareChanged:
        """Let it give back what can be made again, or hold more of it; see `ChangeSpare`.

        Raises:
            EngineDied: If the process is gone.
        """
        with self.inbox(_SPARE) as inbox:
            await self.send(ChangeSpare(_SPARE, n_bytes))
            answer = await inbox.get()
        if isinstance(answer, Failed):
            raise answer.error
        assert isinstance(answer, SpareChanged)
        return answer

    async def outlives(self, wait_s: float) -> bool:
        """Wait so long, or until it has ended; whether it has not."""
        await asyncio.wait({self._tasks[0]}, timeout=wait_s)
        return self.alive

    async def _read_frames(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        frames = wire.FrameCutter()
        try:
            while data := await self._process.stdout.read(_READ_BYTES):
                for body in frames.feed(data):
                    self._take(ANSWERS.decode(body))
        except ConnectionError:
            pass
        except EngineError:
            self._kill("wrote what is not a frame")
        await self._mourn()

    def _take(self, answer: Answer) -> None:
        self._n_heard += 1
        if isinstance(answer, Pong):
            self._check_progress(answer.n_steps)
        elif (inbox := self._inboxes.get(answer.id)) is not None:
            inbox.put_nowait(answer)

    async def _watch(self) -> None:
        """Ask for a sign of life now and then; a process that gives none is ended.

        What counts is heartbeats without an answer, not time: a laptop that slept, or a terminal
        that was suspended together with its processes, was silent without fault.
        """
        assert self._process is not None and self._process.stdin is not None
        assert self._kills is not None
        ping = REQUESTS.encode(Ping("ping"))
        silence_s = 0.0
        while self.death is None:
            n_heard = self._n_heard
            self._kills.note()
            self._process.stdin.write(ping)  # it may not take it, so this does not wait for it
            await asyncio.wait({self._tasks[0]}, timeout=HEARTBEAT_S)
            silence_s = 0.0 if self._n_heard > n_heard else silence_s + HEARTBEAT_S
            if self.death is None and silence_s >= SILENCE_LIMIT_S:
                self._kill(f"gave no sign of life for {silence_s:.0f} s")

    def _check_progress(self, n_steps: int | None) -> None:
        """End a process that has been in the same round of work for too long, if it is in one."""
        is_stuck = n_steps is not None and n_steps == self._n_steps
        self._n_steps = -1 if n_steps is None else n_steps
        self._stuck_s = self._stuck_s + HEARTBEAT_S if is_stuck else 0.0
        if self._stuck_s >= STUCK_LIMIT_S:
            self._kill(f"evaluated one batch for {self._stuck_s:.0f} s")

    def _kill(self, why: str) -> None:
        assert self._process is not None
        self._hung = self._hung or why
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _mourn(self) -> None:
        """Tell everyone who waits that the process is gone, and why."""
        assert self._process is not None
        code = await self._process.wait()
        with contextlib.suppress(asyncio.CancelledError):
            await self._tasks[1]  # its last words
        self.death = self._cause_of_death(code)
        self.ended_at = time.time()
        for request_id, inbox in self._inboxes.items():
            inbox.put_nowait(Failed(request_id, self.death))

    def _cause_of_death(self, code: int) -> EngineDied:
        last_words = list(self._stderr)[-6:]
        facts = shown(last_words)
        if self._stopping:
            return EngineDied("the engine was closed", facts=facts)
        if self._hung:
            return EngineDied(f"the engine's process {self._hung} and was ended", facts=facts)
        assert self._kills is not None
        if died_of_memory(code, self._kills, last_words, was_short=self.memory_is_short):
            return EngineOutOfMemory(
                f"the engine's process {process_ending(code)} because memory ran out",
                facts=facts,
            )
        return EngineDied(f"the engine's process {process_ending(code)}", facts=facts)

    async def _read_stderr(self) -> None:
        """Keep the last lines; a line of any length must not stop this, or the child waits."""
        assert self._process is not None and self._process.stderr is not None
        rest = b""
        while chunk := await self._process.stderr.read(2**16):
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[:_MOST_LINE_BYTES]
            self._note(lines)
        self._note([rest] if rest else [])

    def _note(self, lines: list[bytes]) -> None:
        for line in lines:
            self._stderr.append(line[:_MOST_LINE_BYTES].decode("utf-8", "replace").rstrip())
