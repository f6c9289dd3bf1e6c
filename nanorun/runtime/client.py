"""The engine as everyone else sees it: an async client of the child process.

`Client` is the protocol that the chat, the server and the command line are written against;
`EngineClient` is the local one. A child that dies takes its running replies with it and nothing
else: they end with `EngineDied`, and the next request starts a new child.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any, Protocol, Self

from nanorun.errors import EngineDied, EngineError, NanorunError
from nanorun.model.chat import Event, Finished, GenerateOptions, Message, ModelInfo
from nanorun.runtime import wire
from nanorun.runtime.options import EngineOptions

_N_STDERR_LINES = 40
_CLOSE_TIMEOUT_S = 5.0


class Client(Protocol):
    """Something that answers conversations: a local engine or a remote endpoint."""

    @property
    def info(self) -> ModelInfo | None:
        """What answers; None before `start`."""

    async def start(self) -> ModelInfo:
        """Load or reach the model; does nothing if that is done."""

    async def close(self) -> None:
        """End it."""

    def generate(self, messages: Sequence[Message], options: GenerateOptions) -> Generation:
        """Begin a reply."""


class Generation(Protocol):
    """A reply in the making: iterate over its events, the last of which is `Finished`.

    Leaving the iteration early (`aclose`, or cancelling the task) cancels the reply.
    """

    def __aiter__(self) -> AsyncIterator[Event]: ...
    async def __anext__(self) -> Event: ...

    async def aclose(self) -> None:
        """Cancel the reply if it runs, and stop listening."""

    async def cancel(self) -> None:
        """End the reply; `Finished("cancelled")` follows."""

    async def finish_thinking(self) -> None:
        """Make it answer soon."""

    async def set_budget(self, n_tokens: int | None) -> None:
        """Change its thinking tokens; None for no limit."""


class EngineClient:
    """An engine in a child process.

    Args:
        model: A GGUF file.
        options: How it is opened.
    """

    def __init__(self, model: Path, options: EngineOptions | None = None) -> None:
        self._model = model
        self._options = options or EngineOptions()
        self._ids = count(1)
        self._child: _Child | None = None
        self._starting = asyncio.Lock()

    @property
    def info(self) -> ModelInfo | None:
        """What the opened model is; None before `start`."""
        return self._child.info if self._child else None

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is one."""
        return self._child.pid if self._child and self._child.alive else None

    async def start(self) -> ModelInfo:
        """Start the child and load the model.

        Raises:
            ModelError: If the file cannot be used.
            MemoryPlanError: If the context cannot be allocated.
            EngineDied: If the child ended while loading.
        """
        async with self._starting:
            if self._child is None or not self._child.alive:
                child = _Child()
                try:
                    await child.start(self._model, self._options)
                except BaseException:
                    await child.stop()
                    raise
                self._child = child
            assert self._child.info is not None
            return self._child.info

    async def close(self) -> None:
        """End the child; replies still running end with `EngineDied`."""
        async with self._starting:
            if self._child is not None:
                await self._child.stop()
                self._child = None

    def generate(self, messages: Sequence[Message], options: GenerateOptions) -> EngineGeneration:
        """Begin a reply; the child is started on first use."""
        frame = {
            "verb": "generate",
            "messages": [asdict(message) for message in messages],
            "options": asdict(options),
        }
        return EngineGeneration(self, self._new_id(), frame)

    async def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; `special` lets control-token texts become control tokens."""
        tokens: list[int] = await self._ask({"verb": "tokenize", "text": text, "special": special})
        return tokens

    async def score(
        self, text: str, n_ctx: int = 512, progress: Callable[[int, int], None] | None = None
    ) -> tuple[int, float]:
        """Predictions scored and perplexity of a text; see `runtime/score.py`."""
        value = await self._ask({"verb": "score", "text": text, "n_ctx": n_ctx}, progress)
        return value["n_tokens"], value["ppl"]

    async def _ask(
        self, frame: dict[str, Any], progress: Callable[[int, int], None] | None = None
    ) -> Any:
        child, request_id = await self._ready_child(), self._new_id()
        with child.inbox(request_id) as inbox:
            await child.send({"id": request_id, **frame})
            while True:
                answer = await inbox.get()
                if isinstance(answer, NanorunError):
                    raise answer
                if answer["kind"] == "result":
                    return answer["value"]
                if progress is not None:
                    progress(answer["n_done"], answer["n_total"])

    async def _ready_child(self) -> _Child:
        await self.start()
        assert self._child is not None
        return self._child

    def _new_id(self) -> str:
        return f"r{next(self._ids)}"


class EngineGeneration:
    """A reply of an `EngineClient`; see `Generation`."""

    def __init__(self, client: EngineClient, request_id: str, frame: dict[str, Any]) -> None:
        self._client = client
        self._id = request_id
        self._frame = frame
        self._child: _Child | None = None
        self._stack = contextlib.ExitStack()
        self._inbox: asyncio.Queue[Any] | None = None
        self._done = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._done:
            raise StopAsyncIteration
        try:
            inbox = self._inbox or await self._begin()
            answer = await inbox.get()
        except BaseException:
            await self.aclose()
            raise
        if isinstance(answer, NanorunError):
            self._end()
            raise answer
        event = wire.event_from_json(answer)
        if isinstance(event, Finished):
            self._end()
        return event

    async def _begin(self) -> asyncio.Queue[Any]:
        self._child = await self._client._ready_child()
        self._inbox = self._stack.enter_context(self._child.inbox(self._id))
        await self._child.send({"id": self._id, **self._frame})
        return self._inbox

    async def cancel(self) -> None:
        """End the reply; `Finished("cancelled")` follows."""
        await self._control({"verb": "cancel"})

    async def finish_thinking(self) -> None:
        """Make it answer soon."""
        await self._control({"verb": "finish_thinking"})

    async def set_budget(self, n_tokens: int | None) -> None:
        """Change its thinking tokens; None for no limit."""
        await self._control({"verb": "set_budget", "budget": n_tokens})

    async def aclose(self) -> None:
        """Cancel the reply if it runs, and stop listening."""
        if not self._done:
            await self._control({"verb": "cancel"})
            self._end()

    async def _control(self, frame: dict[str, Any]) -> None:
        if self._child is not None and self._child.alive and not self._done:
            with contextlib.suppress(EngineDied):
                await self._child.send({"id": self._id, **frame})

    def _end(self) -> None:
        self._done = True
        self._stack.close()


class _Child:
    """One child process and the queues of those who wait for its answers."""

    def __init__(self) -> None:
        self.info: ModelInfo | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._inboxes: dict[str, asyncio.Queue[Any]] = {}
        self._stderr: deque[str] = deque(maxlen=_N_STDERR_LINES)
        self._tasks: list[asyncio.Task[None]] = []
        self._death: EngineDied | None = None
        self._stopping = False

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return self._process is not None and self._death is None

    @property
    def pid(self) -> int | None:
        """Its process id."""
        return self._process.pid if self._process else None

    async def start(self, model: Path, options: EngineOptions) -> None:
        """Spawn it and wait until the model is loaded."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "nanorun.runtime.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # ggml would start a debugger to print a backtrace of an abort.
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )  # fmt: skip
        self._tasks = [
            asyncio.create_task(self._read_frames()),
            asyncio.create_task(self._read_stderr()),
        ]
        with self.inbox("open") as inbox:
            frame = {"id": "open", "path": str(model), "options": asdict(options)}
            await self.send(frame)
            answer = await inbox.get()
        if isinstance(answer, NanorunError):
            raise answer
        self.info = ModelInfo(**answer["info"])

    async def stop(self) -> None:
        """Ask it to close, then make it."""
        self._stopping = True
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(EngineDied):
                await self.send({"id": "close", "verb": "close"})
            try:
                await asyncio.wait_for(process.wait(), _CLOSE_TIMEOUT_S)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        for task in self._tasks:
            await task
        if process is not None and process.stdin is not None:
            process.stdin.close()

    @contextlib.contextmanager
    def inbox(self, request_id: str) -> Any:
        """A queue of the answers to one request, for the time of a `with` block."""
        if self._death is not None:
            raise self._death
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self._inboxes[request_id] = queue
        try:
            yield queue
        finally:
            del self._inboxes[request_id]

    async def send(self, frame: dict[str, Any]) -> None:
        """Write a frame.

        Raises:
            EngineDied: If the process is gone.
        """
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(wire.pack(frame))
            await self._process.stdin.drain()
        except (ConnectionError, RuntimeError) as error:
            raise self._death or EngineDied("the engine's process is gone") from error

    async def _read_frames(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        stream = self._process.stdout
        try:
            while True:
                header = await stream.readexactly(wire.HEADER_BYTES)
                frame = wire.unpack(await stream.readexactly(wire.frame_bytes(header)))
                inbox = self._inboxes.get(frame["id"])
                if inbox is not None:
                    is_error = frame["kind"] == "error"
                    inbox.put_nowait(wire.error_from_json(frame) if is_error else frame)
        except (asyncio.IncompleteReadError, ConnectionError, EngineError):
            pass
        await self._mourn()

    async def _mourn(self) -> None:
        """Tell everyone who waits that the process is gone, and why."""
        assert self._process is not None
        code = await self._process.wait()
        self._death = EngineDied(
            "the engine was closed" if self._stopping else f"the engine's process {_ending(code)}",
            facts=list(self._stderr)[-6:],
        )
        for inbox in self._inboxes.values():
            inbox.put_nowait(self._death)

    async def _read_stderr(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        async for line in self._process.stderr:
            self._stderr.append(line.decode("utf-8", "replace").rstrip())


def _ending(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ", perhaps because memory ran out" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"
