"""An endpoint on loopback that says what a test tells it to, byte by byte."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

Piece = bytes | float | Literal["reset"]
"""Bytes to send, seconds to wait, or the connection torn down."""

VLLM_MODEL = {"id": "nano", "owned_by": "vllm", "max_model_len": 262144}
LLAMA_MODEL = {"id": "nano", "owned_by": "llamacpp", "meta": {"n_ctx": 4096, "n_params": 7}}
NANORUN_MODEL = {"id": "nano", "owned_by": "nanorun", "max_model_len": 8192}
OTHER_MODEL = {"id": "nano", "owned_by": "somebody"}


def sse(*payloads: Any) -> bytes:
    """Events with these payloads; text goes as it is."""
    texts = (p if isinstance(p, str) else json.dumps(p) for p in payloads)
    return "".join(f"data: {text}\n\n" for text in texts).encode()


def delta(reason: str | None = None, **fields: Any) -> dict[str, Any]:
    """A chunk of a stream."""
    choice = {"index": 0, "delta": fields, "finish_reason": reason}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]}


def usage(prompt: int, completion: int, **details: Any) -> dict[str, Any]:
    """The chunk with the usage."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, **details}
    return {"id": "chatcmpl-1", "choices": [], "usage": counts}


@dataclass
class Answer:
    """One response."""

    pieces: Sequence[Piece] = ()
    status: int = 200
    kind: str = "text/event-stream"
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def stream(cls, *payloads: Any) -> Answer:
        """A stream that ends as it should."""
        return cls([sse(*payloads, "[DONE]")])

    @classmethod
    def json(cls, body: Any, status: int = 200, **headers: str) -> Answer:
        """A whole body."""
        return cls([json.dumps(body).encode()], status, "application/json", headers)


@dataclass
class Request:
    """What was asked."""

    path: str
    headers: dict[str, str]
    body: Any


class ScriptedEndpoint:
    """Answers chat completions from a list, the last of which repeats."""

    def __init__(self, *answers: Answer, models: Sequence[Any], control: Answer | None) -> None:
        self.url = ""
        self.requests: list[Request] = []
        self.controls: list[Request] = []
        self.n_models = 0
        self.n_dropped = 0
        """Connections that the client closed before all was said."""
        self._answers = deque(answers)
        self._models = Answer.json({"object": "list", "data": list(models)})
        self._control = control or Answer.json({"success": True})

    def models_answer(self, answer: Answer) -> None:
        """Say something else at `/v1/models`."""
        self._models = answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle one connection, which carries one request."""
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._answer(reader, writer)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.split("\r\n")
        headers = {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}
        data = await reader.readexactly(int(headers.get("content-length", 0)))
        request = Request(first.split()[1], headers, json.loads(data) if data else None)
        answer = self._choose(request)
        answer_head = [f"HTTP/1.1 {answer.status} Told", f"Content-Type: {answer.kind}"]
        answer_head += [f"{name}: {value}" for name, value in answer.headers.items()]
        writer.write("\r\n".join([*answer_head, "Connection: close", "", ""]).encode())
        gone = asyncio.ensure_future(reader.read())
        try:
            await self._say(answer.pieces, writer, gone)
        finally:
            gone.cancel()

    async def _say(
        self, pieces: Sequence[Piece], writer: asyncio.StreamWriter, gone: asyncio.Future[bytes]
    ) -> None:
        for piece in pieces:
            if piece == "reset":
                writer.transport.abort()
            elif isinstance(piece, bytes):
                writer.write(piece)
                await writer.drain()
            elif (await asyncio.wait({gone}, timeout=float(piece)))[0]:
                self.n_dropped += 1
                return

    def _choose(self, request: Request) -> Answer:
        if request.path == "/v1/models":
            self.n_models += 1
            self.requests_of_models = request
            return self._models
        if request.path.endswith("/control"):
            self.controls.append(request)
            return self._control
        self.requests.append(request)
        return self._answers.popleft() if len(self._answers) > 1 else self._answers[0]


@asynccontextmanager
async def scripted(
    *answers: Answer, models: Sequence[Any] = (OTHER_MODEL,), control: Answer | None = None
) -> AsyncIterator[ScriptedEndpoint]:
    """The endpoint, while it listens."""
    endpoint = ScriptedEndpoint(*answers, models=models, control=control)
    server = await asyncio.start_server(endpoint.serve, "127.0.0.1", 0)
    endpoint.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield endpoint
