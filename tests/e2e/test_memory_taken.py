"""Others take memory while a model is served: the engine is killed, and is not loaded into that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.waiting import PATIENCE_S, wait_until

PROGRAM = Path(__file__).parent.parent / "support" / "serve_beside_others.py"
GIB = 2**30
PLENTY, TOO_LITTLE, ALMOST_NOTHING = 22 * GIB, 15 * GIB, 100 * 2**20


@dataclass
class Server:
    """The endpoint, and what the test tells it."""

    pid: int
    url: str
    notes: Path

    @property
    def engine_pids(self) -> list[int]:
        return [int(pid) for pid in (self.notes / "pids").read_text().split()]

    @property
    def n_running_engines(self) -> int:
        return len(psutil.Process(self.pid).children())

    def leave(self, n_bytes: int) -> None:
        """Other programs leave so much."""
        partial = self.notes / "free.part"
        partial.write_text(str(n_bytes))
        partial.replace(self.notes / "free")

    def wait_for_looks(self, n: int) -> None:
        looks = self.notes / "looks"
        n_wanted = (looks.stat().st_size if looks.exists() else 0) + n
        wait_until(lambda: looks.exists() and looks.stat().st_size >= n_wanted)

    def ask(self) -> httpx.Response:
        message = {"role": "user", "content": "1234 + 4248"}
        body = {"messages": [message], "temperature": 0}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=PATIENCE_S)

    def health(self) -> httpx.Response:
        return httpx.get(f"{self.url}/health", timeout=PATIENCE_S)


@pytest.fixture
def server(pico_gguf: Path, tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "free").write_text(str(PLENTY))
    command = [sys.executable, str(PROGRAM), str(pico_gguf), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip().removesuffix("/v1")
        try:
            yield Server(process.pid, url, tmp_path)
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def test_killed_engine_is_loaded_again_only_once_it_fits(server: Server) -> None:
    first = server.ask()
    assert first.status_code == 200
    assert server.health().json()["status"] == "ok"
    server.wait_for_looks(1)
    (engine,) = server.engine_pids

    with ThreadPoolExecutor(1) as thread:
        os.kill(engine, signal.SIGSTOP)  # it says nothing before it is killed
        hanging = thread.submit(server.ask)
        wait_until(lambda: server.health().json()["n_active"] == 1)
        server.leave(ALMOST_NOTHING)
        server.wait_for_looks(2)
        os.kill(engine, signal.SIGKILL)
        refused = hanging.result(PATIENCE_S)

    server.leave(TOO_LITTLE)
    for response in (refused, server.ask(), server.ask()):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        error = response.json()["error"]
        assert error["code"] == "out_of_memory"
        assert "the model needs 18.0 GiB of main memory, but " in error["message"]
        assert "most is held by " in error["message"]
    assert server.n_running_engines == 0
    health = server.health()
    assert (health.status_code, health.json()["status"]) == (503, "error")
    assert "but 15.0 GiB are free" in health.json()["reason"]

    server.leave(PLENTY)  # the other program has ended
    health = server.health()
    assert (health.status_code, health.json()["status"]) == (200, "unloaded")
    answer = server.ask()
    assert answer.status_code == 200
    assert answer.json()["choices"] == first.json()["choices"]
    assert server.health().json()["status"] == "ok"
    server.wait_for_looks(1)
    assert len(server.engine_pids) == 2
