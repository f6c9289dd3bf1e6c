"""The clients that must behave alike, each over the real thing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.client import EngineClient
from nanorun.runtime.protocol import Client
from nanorun.runtime.remote import RemoteClient
from tests.support.waiting import PATIENCE_S, wait_until

N_CTX = 4096
PEER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.port, params.n_ctx, params.n_parallel = int(sys.argv[2]), int(sys.argv[3]), 4
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.kv_unified = True
server = xllamacpp.Server(params)
time.sleep(10**6)
"""


class Server:
    """A server process that can be killed and started again at the same address."""

    def __init__(self, command: list[str], port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(self._answers)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the server ended: {self._command}"
        try:
            return httpx.get(f"{self.url}/health", timeout=PATIENCE_S).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """End it without a word; nanorun's engine goes with it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@dataclass
class Subject:
    """A client, and what can be done to what it talks to."""

    kind: str
    client: Client
    server: Server | None

    def kill(self) -> None:
        """End what answers, in mid-answer."""
        if self.server is not None:
            self.server.kill()
            return
        pid = getattr(self.client, "pid", None)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def restart(self) -> None:
        """Start it again, if it does not do that by itself."""
        if self.server is not None:
            self.server.start()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _command(kind: str, model: Path, port: int) -> list[str]:
    if kind == "nanorun":
        return [
            sys.executable, "-m", "nanorun", "serve", str(model), "--port", str(port),
            "--n-ctx", str(N_CTX), "--no-state",
        ]  # fmt: skip
    peer = os.environ.get("PEER_PYTHON")
    if peer is None:
        pytest.skip("PEER_PYTHON names no Python that has xllamacpp")
    return [peer, "-c", PEER, str(model), str(port), str(N_CTX)]


@contextmanager
def _serving(kind: str, model: Path) -> Iterator[Server | None]:
    if kind == "engine":
        yield None
        return
    port = _free_port()
    server = Server(_command(kind, model, port), port)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module", params=["engine", "nanorun", "llama.cpp"])
def served(request: pytest.FixtureRequest, pico_gguf: Path) -> Iterator[tuple[str, Any]]:
    """One server of each kind for all tests of a module."""
    with _serving(request.param, pico_gguf) as server:
        yield request.param, server


@pytest.fixture
async def subject(served: tuple[str, Any], pico_gguf: Path) -> AsyncIterator[Subject]:
    kind, server = served
    client: Client
    if server is None:
        client = EngineClient(pico_gguf, EngineOptions(n_ctx=N_CTX, n_threads=1))
    else:
        client = RemoteClient(server.url)
    try:
        yield Subject(kind, client, server)
    finally:
        await client.close()
