"""A client that leaves costs no further batch: on every route, in prefill and in decode.

The engine's process is stopped in the middle of a batch while the client leaves. What it is asked
is then in a known order: how many batches there were, that the reply is cancelled, and again how
many there were. So batches can be counted, on a machine of any speed.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from nanorun.model.chat import EngineStats, GenerateOptions, Prompt
from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.client import EngineClient
from nanorun.runtime.generation import EngineGeneration
from nanorun.server.app import create_app
from nanorun.server.listen import bind, serve
from nanorun.server.settings import ServerSettings
from tests.support.waiting import PATIENCE_S

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are stopped by SIGSTOP")

LONG = "Remember: fox=1234, owl=4321. " * 700
OPTIONS = EngineOptions(n_ctx=16384, n_batch=64, n_ubatch=64, n_threads=1, read_ahead=False)


class EndlessClient(EngineClient):
    """Its replies end when they are told to."""

    def generate(self, prompt: Prompt, options: GenerateOptions) -> EngineGeneration:
        return super().generate(prompt, replace(options, ignore_eos=True, max_tokens=None))


@dataclass
class Running:
    """An endpoint over a real engine, in this event loop."""

    client: EngineClient
    http: httpx.AsyncClient
    port: int

    async def phase(self) -> str | None:
        """How far the one reply is; None if there is none."""
        slots = [slot for slot in (await self.http.get("/slots")).json() if "phase" in slot]
        if not slots:
            return None
        phase: str = slots[0]["phase"]
        has_begun = phase == "prefill" and slots[0]["n_prompt_tokens_processed"] > 0
        return "prefill begun" if has_begun else phase

    async def n_active(self) -> int:
        health = (await self.http.get("/health")).json()
        return int(health["n_active"])

    async def ask_stats(self) -> asyncio.Task[EngineStats]:
        """Ask the engine, which does not answer while it is stopped."""
        asked = asyncio.create_task(self.client.stats())
        for _ in range(20):  # until it is written to the pipe
            await asyncio.sleep(0)
        return asked


@asynccontextmanager
async def running(model: Path) -> AsyncIterator[Running]:
    client = EndlessClient(model, OPTIONS)
    await client.start()
    settings = ServerSettings(n_parallel=1, drain_s=1)
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    servers: asyncio.Queue[uvicorn.Server] = asyncio.Queue()
    app = create_app(client, model_name="pico", settings=settings)
    serving = asyncio.create_task(serve(app, listener, settings, servers.put_nowait))
    server = await servers.get()
    try:
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as http:
            yield Running(client, http, port)
    finally:
        server.should_exit = True
        await serving
        await client.close()


def _messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


ROUTES: dict[str, Any] = {
    "/v1/chat/completions": lambda text: {"messages": _messages(text)},
    "/v1/completions": lambda text: {"prompt": text},
    "/v1/messages": lambda text: {"messages": _messages(text), "max_tokens": 9},
    "/api/chat": lambda text: {"messages": _messages(text)},
    "/api/generate": lambda text: {"prompt": text},
}


async def wait_for(endpoint: Running, phases: set[str]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await endpoint.phase() not in phases:
            pass


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["prefill", "decode"])
async def test_client_that_leaves_costs_no_further_batch(
    pico_gguf: Path, when: str, stream: bool
) -> None:
    phases = {"prefill begun"} if when == "prefill" else {"thinking", "answer"}
    async with running(pico_gguf) as endpoint:
        for path, body_of in ROUTES.items():
            text = LONG if when == "prefill" else "What is 12 + 34?"
            body = json.dumps({**body_of(f"{path} {text}"), "stream": stream}).encode()
            n_further = await _leave(endpoint, path, body, phases)
            assert n_further <= 1, path


async def _leave(endpoint: Running, path: str, body: bytes, phases: set[str]) -> int:
    """Ask, leave in one of some phases, and count the batches after that."""
    _, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await wait_for(endpoint, phases)
    assert endpoint.client.pid is not None
    os.kill(endpoint.client.pid, signal.SIGSTOP)
    try:
        assert await endpoint.phase() in phases
        before = await endpoint.ask_stats()
        writer.transport.abort()
        async with asyncio.timeout(PATIENCE_S):
            while await endpoint.n_active():
                pass
    finally:
        os.kill(endpoint.client.pid, signal.SIGCONT)
    n_before = (await before).n_batches
    async with asyncio.timeout(PATIENCE_S):
        while (after := await endpoint.client.stats()).n_running:
            pass
    return after.n_batches - n_before
