"""Thousands of requests, some cut off, and engines killed: nothing sticks, nothing leaks.

    python bench/soak.py MODEL.gguf --requests 10000 --kills 50

People's conversations run over HTTP against a real server: some turns are cut off by a client that
hangs up, and the engine's process is killed now and then in the second half. Prints what happened,
how memory grew over the first half (where one process lives all along), and what the engine holds
at the end. Exits with 1 if a conversation could not go on, a sequence is stuck or memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
import uvicorn

from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.client import EngineClient
from nanorun.server.app import create_app
from nanorun.server.settings import ServerSettings

N_PEOPLE = 12
# Growth a thousand requests that is within noise.
MAX_MIB_PER_1000 = 2.0


@dataclass
class Soak:
    """What is counted."""

    client: EngineClient
    url: str
    n_wanted: int
    n_kills_wanted: int
    rng: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)
    n_done: int = 0
    n_kills: int = 0
    samples: list[tuple[int, float]] = field(default_factory=list)
    """Requests done and RSS of the engine's process in MiB, in the first half."""

    async def person(self, http: httpx.AsyncClient, i_person: int) -> None:
        """Turn after turn; a turn that failed is asked again, as a person would."""
        rng = random.Random(i_person)
        messages: list[dict[str, str]] = []
        while self.n_done < self.n_wanted:
            if len(messages) > 8 or rng.random() < 0.1:
                messages = []
            a, b = rng.randint(1, 999), rng.randint(1, 999)
            messages.append({"role": "user", "content": f"What is {a} + {b}?"})
            for _ in range(5):
                answer = await self.turn(http, messages, rng)
                if answer is not None:
                    break
                self.outcomes["asked again"] += 1
            else:
                self.outcomes["gave up"] += 1
                answer = ""
            messages.append({"role": "assistant", "content": answer})

    async def turn(
        self, http: httpx.AsyncClient, messages: list[dict[str, str]], rng: random.Random
    ) -> str | None:
        """One request: read to its end, or cut off; None if the engine died under it."""
        hangs_up = rng.random() < 0.2
        n_most = rng.randint(0, 30)
        body = {
            "messages": messages, "stream": True, "max_tokens": 60,
            "reasoning_effort": rng.choice(["none", "low"]),
            "service_tier": rng.choice(["flex", "default"]),
        }  # fmt: skip
        answer, ended = "", False
        async with http.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
            n_lines = 0
            async for line in response.aiter_lines():
                n_lines += 1
                if '"error"' in line:
                    self.outcomes["engine died"] += 1
                    return None
                ended = ended or line == "data: [DONE]"
                if hangs_up and n_lines > n_most:
                    break
        self.n_done += 1
        self.outcomes["hung up" if hangs_up and not ended else "answered"] += 1
        return answer

    async def watch(self) -> None:
        """Take samples in the first half, kill in the second."""
        half = self.n_wanted // 2
        while self.n_done < self.n_wanted:
            await asyncio.sleep(0.2)
            pid = self.client.pid
            if pid is None:
                continue
            if self.n_done < half:
                rss = psutil.Process(pid).memory_info().rss
                self.samples.append((self.n_done, rss / 2**20))
            elif self.n_kills < self.n_kills_wanted * (self.n_done - half) / half:
                os.kill(pid, signal.SIGKILL)
                self.n_kills += 1

    def growth(self) -> float:
        """MiB a thousand requests, over the second three quarters of the first half."""
        settled = [(n, rss) for n, rss in self.samples if n > self.n_wanted // 8]
        n, rss = np.array(settled).T
        return float(np.polyfit(n, rss, 1)[0] * 1000)


async def run(model: Path, n_requests: int, n_kills: int) -> int:
    """The whole soak; the process's exit code."""
    with tempfile.TemporaryDirectory() as states:
        options = EngineOptions(
            n_ctx=4096, n_threads=1, state_dir=states, archive_bytes=16 * 2**20,
            checkpoint_bytes=16 * 2**20, state_bytes=64 * 2**20,
        )  # fmt: skip
        client = EngineClient(model, options)
        await client.start()
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = create_app(client, model_name="pico", settings=ServerSettings(n_parallel=4))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        serving = asyncio.create_task(server.serve([listener]))
        soak = Soak(client, url, n_requests, n_kills, random.Random(0))
        started = time.monotonic()
        limits = httpx.Limits(max_connections=N_PEOPLE * 2)
        async with httpx.AsyncClient(timeout=300, limits=limits) as http:
            people = (soak.person(http, i) for i in range(N_PEOPLE))
            await asyncio.gather(soak.watch(), *people)
        await asyncio.sleep(1)
        stats = await client.stats()
        n_files = len(list(Path(states).glob("*.part")))
        server.should_exit = True
        await serving
        await client.close()
    seconds = time.monotonic() - started
    print(f"{soak.n_done} requests in {seconds:.0f} s, {soak.n_kills} engines killed")
    print(", ".join(f"{name}: {n}" for name, n in soak.outcomes.most_common()))
    print(f"memory of the engine's process: {soak.growth():+.2f} MiB a thousand requests")
    print(f"at the end: {stats}")
    stuck = stats.n_running + stats.n_waiting + n_files
    return int(soak.outcomes["gave up"] > 0 or stuck > 0 or soak.growth() > MAX_MIB_PER_1000)


def main() -> int:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=50)
    args = parser.parse_args()
    return asyncio.run(run(args.model, args.requests, args.kills))


if __name__ == "__main__":
    sys.exit(main())
