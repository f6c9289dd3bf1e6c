"""Starting the two servers that benchmarks compare, and asking them in the same words.

The peer is llama.cpp's own C++ server as the `xllamacpp` package carries it. It need not be
installed beside nanorun: name its Python with `PEER_PYTHON`. Both servers take as many threads as
there are CPUs for them: `taskset -c 0 python bench/...` makes that one, which a busy machine needs.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

PEER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.port, params.n_ctx, params.n_parallel = map(int, sys.argv[2:5])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[5])
params.kv_unified = True
server = xllamacpp.Server(params)
print("ready", flush=True)
time.sleep(10**6)
"""
THINK_END = 13


@dataclass
class Reply:
    """What came back, and when."""

    thinking: str = ""
    answer: str = ""
    first_token_s: float = 0.0
    total_s: float = 0.0
    n_prompt: int = 0
    n_cached: int = 0
    n_completion: int = 0
    deltas: int = field(default=0, repr=False)

    @property
    def n_read(self) -> int:
        """Prompt tokens that were evaluated."""
        return self.n_prompt - self.n_cached


@dataclass(frozen=True)
class Server:
    """A running server."""

    name: str
    url: str
    pid: int

    def body(
        self, messages: Sequence[dict[str, str]], *, n_thinking: int, n_answer: int
    ) -> dict[str, Any]:
        """A request for a streamed reply of forced lengths.

        `</think>` is banned, so only the reasoning budget closes the thinking; the end of the turn
        is ignored, so only `max_tokens` ends the answer.
        """
        n_total = n_thinking + n_answer
        body: dict[str, Any] = {
            "messages": messages, "stream": True, "stream_options": {"include_usage": True},
            "temperature": 0, "max_tokens": n_total, "ignore_eos": True,
        }  # fmt: skip
        if self.name == "nanorun":
            return body | {"logit_bias": {THINK_END: -100}, "reasoning_budget": n_thinking}
        return body | {
            "logit_bias": [[THINK_END, -100.0]],
            "reasoning_budget_tokens": n_thinking,
            "chat_template_kwargs": {"enable_thinking": n_thinking > 0},
            "cache_prompt": True,
        }

    def cpu_s(self) -> tuple[float, float]:
        """CPU time so far: of the server's own process, and of its children (nanorun's engine)."""
        process = psutil.Process(self.pid)
        own, *others = [p.cpu_times() for p in (process, *process.children(recursive=True))]
        return own.user + own.system, sum(t.user + t.system for t in others)

    def ask(self, messages: Sequence[dict[str, str]], *, n_thinking: int, n_answer: int) -> Reply:
        """One streamed reply of forced lengths; see `body`."""
        body = self.body(messages, n_thinking=n_thinking, n_answer=n_answer)
        reply, started = Reply(), time.perf_counter()
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=600) as r:
            if r.status_code != 200:
                raise RuntimeError(f"{self.name}: {r.read().decode()}")
            for line in r.iter_lines():
                if line.startswith("data: {"):
                    _take(reply, json.loads(line[6:]), started)
        reply.total_s = time.perf_counter() - started
        return reply


def _take(reply: Reply, chunk: dict[str, Any], started: float) -> None:
    if "error" in chunk:
        raise RuntimeError(chunk["error"])
    for choice in chunk.get("choices", ()):
        delta = choice["delta"]
        thinking, answer = (
            delta.get("reasoning") or delta.get("reasoning_content") or "",
            delta.get("content") or "",
        )
        if (thinking or answer) and not reply.first_token_s:
            reply.first_token_s = time.perf_counter() - started
        reply.thinking += thinking
        reply.answer += answer
    if usage := chunk.get("usage"):
        reply.n_prompt = usage["prompt_tokens"]
        reply.n_completion = usage["completion_tokens"]
        reply.n_cached = usage["prompt_tokens_details"]["cached_tokens"]


@contextmanager
def nanorun_server(model: Path, n_ctx: int, n_parallel: int) -> Iterator[Server]:
    """`nanorun serve` on a free port, with no states of earlier runs on disk."""
    port = _free_port()
    command = [
        sys.executable, "-m", "nanorun", "serve", str(model), "--port", str(port),
        "--n-ctx", str(n_ctx), "--parallel", str(n_parallel),
    ]  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        _running("nanorun", command, port, {"NANORUN_CACHE_DIR": folder}) as server,
    ):
        yield server


@contextmanager
def peer_server(model: Path, n_ctx: int, n_parallel: int) -> Iterator[Server]:
    """llama.cpp's server on a free port, with the same threads."""
    port = _free_port()
    python = os.environ.get("PEER_PYTHON", sys.executable)
    numbers = map(str, (port, n_ctx, n_parallel, len(os.sched_getaffinity(0))))
    with _running("llama.cpp", [python, "-c", PEER, str(model), *numbers], port) as server:
        yield server


@contextmanager
def _running(
    name: str, command: Sequence[str], port: int, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
    )  # fmt: skip
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with {process.returncode}: {command}")
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield Server(name, url, process.pid)
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
