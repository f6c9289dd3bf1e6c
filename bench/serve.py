"""Requests that follow each other without a pause, as agents and evaluations send them.

    PEER_PYTHON=... python bench/serve.py MODEL.gguf [--clients 1 8 64 256]

Each client asks short new conversations one after the other; answers are streamed and of a forced
length. Servers take turns (A B A B), each started anew, with eight slots and the same threads.
Prints, for each number of clients, time to first token, tokens a second over all clients, requests
that were sent away (429) and the CPU time of the server's process and of its engine's (llama.cpp's
server is one process), and the medians of nanorun's ratio to llama.cpp's server in each round.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from servers import Server, nanorun_server, peer_server

N_SLOTS = 8
QUESTION = "Number {i}: the sky is blue and birds can fly. What is {a} + {b}? Explain it in words."
HEADER = """
| server | clients | first token p50 ms | p99 ms | tokens/s | sent away | server CPU ms | engine's |
|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Load:
    """What one server did with one round of requests."""

    first_token_s: list[float]
    """One a conversation, the first of each client left out where it has more: there the server
    has been idle."""
    tps: float
    """Tokens a second, over all clients."""
    n_sent_away: int
    server_cpu_ms: float
    """CPU time of the server's process, a token."""
    engine_cpu_ms: float
    """The same of its children."""

    @property
    def cpu_ms(self) -> float:
        """CPU time of all processes, a token."""
        return self.server_cpu_ms + self.engine_cpu_ms

    def row(self, name: str, n_clients: int) -> str:
        """A row of the table."""
        p50, p99 = np.percentile(self.first_token_s, (50, 99)) * 1000
        return (
            f"| {name} | {n_clients} | {p50:.1f} | {p99:.1f} | {self.tps:.1f} "
            f"| {self.n_sent_away} | {self.server_cpu_ms:.3f} | {self.engine_cpu_ms:.3f} |"
        )


def converse(server: Server, first: int, n: int, n_tokens: int, pause_s: float) -> list[float]:
    """`n` new conversations of one client; the time to the first token of those it was answered.

    The connection is read with as little work as possible: client and server share the machine.
    """
    times = []
    for i in range(first, first + n):
        text = QUESTION.format(i=i, a=31 * i + 7, b=17 * i + 40)
        messages = [{"role": "user", "content": text}]
        body = json.dumps(server.body(messages, n_thinking=0, n_answer=n_tokens))
        headers = {"Content-Type": "application/json"}
        address = urlsplit(server.url).netloc
        started = time.perf_counter()
        with closing(http.client.HTTPConnection(address, timeout=600)) as connection:
            connection.request("POST", "/v1/chat/completions", body, headers)
            response = connection.getresponse()
            if response.status != HTTPStatus.TOO_MANY_REQUESTS:
                times.append(_read(response, n_tokens) - started)
        time.sleep(pause_s)
    return times


def _read(response: http.client.HTTPResponse, n_tokens: int) -> float:
    """Read a streamed reply to its end; when its first text came."""
    first, last_data = 0.0, b""
    while line := response.readline():
        if not first and b'"content":"' in line and b'"content":""' not in line:
            first = time.perf_counter()
        if line.startswith(b"data: {"):
            last_data = line
    n_made = json.loads(last_data[6:])["usage"]["completion_tokens"] if last_data else 0
    if response.status != 200 or not first or n_made != n_tokens:
        raise RuntimeError(f"{response.status}: {last_data.decode()}")
    return first


def run(server: Server, n_clients: int, args: argparse.Namespace) -> Load:
    """One round of requests, after one that warms the server up."""
    converse(server, 10**6, 1, args.tokens, 0)
    n_each = max(1, args.conversations // n_clients)
    server_s, engine_s = server.cpu_s()
    started = time.perf_counter()
    with ThreadPoolExecutor(n_clients) as pool:
        times = list(
            pool.map(
                lambda c: converse(server, 1000 * c, n_each, args.tokens, args.pause),
                range(n_clients),
            )
        )
    wall_s = time.perf_counter() - started
    n_answered = sum(map(len, times))
    n_made = n_answered * args.tokens
    server_end_s, engine_end_s = server.cpu_s()
    return Load(
        [t for client in times for t in (client[1:] or client)],
        n_made / wall_s,
        n_each * n_clients - n_answered,
        1000 * (server_end_s - server_s) / n_made,
        1000 * (engine_end_s - engine_s) / n_made,
    )


def compare(n_clients: int, args: argparse.Namespace) -> None:
    """Run the rounds of one number of clients; print a row a server and round, and the ratios."""
    print(HEADER)
    ratios = []
    for _ in range(args.rounds):
        loads = []
        for start in (nanorun_server, peer_server):
            with start(args.model, args.n_ctx, N_SLOTS) as server:
                loads.append(run(server, n_clients, args))
            print(loads[-1].row(server.name, n_clients), flush=True)
        ours, theirs = loads
        medians = [statistics.median(load.first_token_s) for load in loads]
        ratios.append((medians[0] / medians[1], ours.tps / theirs.tps, ours.cpu_ms / theirs.cpu_ms))
    first, tps, cpu = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(f"\nfirst token {first:.2f} x, tokens a second {tps:.2f} x, CPU a token {cpu:.2f} x")


def main() -> None:
    """Compare at each number of clients."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1], help="at the same time")
    parser.add_argument(
        "--conversations", type=int, default=24, help="of all clients together; one each at least"
    )
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two requests")
    parser.add_argument("--n-ctx", type=int, default=16384)
    args = parser.parse_args()
    for n_clients in args.clients:
        compare(n_clients, args)


if __name__ == "__main__":
    main()
