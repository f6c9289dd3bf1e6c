"""Requests that follow each other without a pause, as agents and evaluations send them.

    PEER_PYTHON=... python bench/serve.py MODEL.gguf [--clients 1]

Each client asks short new conversations one after the other; answers are streamed and of a forced
length. Servers take turns (A B A B), each started anew, with eight slots
and the same threads. Prints time to first token, tokens a second over all clients and the server's
CPU time, and the medians of nanorun's ratio to llama.cpp's server in each round.
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
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from servers import Server, nanorun_server, peer_server

N_SLOTS = 8
QUESTION = "Number {i}: the sky is blue and birds can fly. What is {a} + {b}? Explain it in words."


@dataclass(frozen=True)
class Load:
    """What one server did with one round of requests."""

    first_token_s: list[float]
    """One a conversation, the first of each client left out: there the server has been idle."""
    tps: float
    """Tokens a second, over all clients."""
    cpu_ms: float
    """The server's CPU time a token."""


def converse(server: Server, first: int, n: int, n_tokens: int, pause_s: float) -> list[float]:
    """`n` new conversations of one client; the time to each one's first token.

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
            times.append(_read(connection.getresponse(), n_tokens) - started)
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
    n_made = json.loads(last_data[6:])["usage"]["completion_tokens"]
    if response.status != 200 or not first or n_made != n_tokens:
        raise RuntimeError(f"{response.status}: {last_data.decode()}")
    return first


def run(server: Server, args: argparse.Namespace) -> Load:
    """One round of requests, after one that warms the server up."""
    converse(server, 10**6, 1, args.tokens, 0)
    n_each = args.conversations // args.clients
    cpu_s, started = server.cpu_s(), time.perf_counter()
    with ThreadPoolExecutor(args.clients) as pool:
        times = list(
            pool.map(
                lambda c: converse(server, 1000 * c, n_each, args.tokens, args.pause),
                range(args.clients),
            )
        )
    n_made, wall_s = n_each * args.clients * args.tokens, time.perf_counter() - started
    cpu_ms = 1000 * (server.cpu_s() - cpu_s) / n_made
    return Load([t for client in times for t in client[1:]], n_made / wall_s, cpu_ms)


def main() -> None:
    """Run the rounds, print a row a server and round, and the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--conversations", type=int, default=24, help="of all clients together")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two requests")
    parser.add_argument("--n-ctx", type=int, default=16384)
    args = parser.parse_args()
    print("| server | first token p50 ms | p99 ms | tokens/s | CPU ms a token |")
    print("|---|---|---|---|---|")
    ratios = []
    for _ in range(args.rounds):
        loads = []
        for start in (nanorun_server, peer_server):
            with start(args.model, args.n_ctx, N_SLOTS) as server:
                load = run(server, args)
            loads.append(load)
            p50, p99 = np.percentile(load.first_token_s, (50, 99)) * 1000
            row = f"| {server.name} | {p50:.1f} | {p99:.1f} | {load.tps:.1f} | {load.cpu_ms:.2f} |"
            print(row, flush=True)
        ours, theirs = loads
        medians = [statistics.median(load.first_token_s) for load in loads]
        ratios.append((medians[0] / medians[1], ours.tps / theirs.tps, ours.cpu_ms / theirs.cpu_ms))
    first, tps, cpu = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(f"\nfirst token {first:.2f} x, tokens a second {tps:.2f} x, CPU a token {cpu:.2f} x")


if __name__ == "__main__":
    main()
