"""Eight requests at once with a shared prefix of about 4,000 tokens and different tails.

    PEER_PYTHON=... python bench/shared_prefix.py MODEL.gguf

Both servers have eight slots and the same threads; an answer has one token, so the time is that of
reading. Prints the total time of both, their ratio, and the prompt tokens that were read.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from servers import Reply, Server, nanorun_server, peer_server

N_REQUESTS = 8
PREFIX = "The sky is blue. Water is wet. Birds can fly. Fish can swim. Trees are tall. " * 175
TAIL = " Night is dark. Snow is cold. The sun is warm." * 7


def burst(server: Server) -> tuple[float, list[Reply]]:
    """All requests at once; seconds until the last is answered."""
    prompts = [f"{PREFIX} {i * 1111 + 7}{TAIL} What is {i} + {i}?" for i in range(N_REQUESTS)]
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    with ThreadPoolExecutor(N_REQUESTS) as pool:
        started = time.perf_counter()
        replies = list(pool.map(lambda m: server.ask(m, n_thinking=0, n_answer=1), messages))
        return time.perf_counter() - started, replies


def main() -> None:
    """Run both, print a row each and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--n-ctx", type=int, default=65536)
    args = parser.parse_args()
    times = []
    print("| server | total s | prompt tokens | read |")
    print("|---|---|---|---|")
    for start in (nanorun_server, peer_server):
        with start(args.model, args.n_ctx, N_REQUESTS) as server:
            total_s, replies = burst(server)
        times.append(total_s)
        n_prompt, n_read = (sum(getattr(r, n) for r in replies) for n in ("n_prompt", "n_read"))
        print(f"| {server.name} | {total_s:.2f} | {n_prompt} | {n_read} |")
    print(f"\nratio {times[0] / times[1]:.2f}")


if __name__ == "__main__":
    main()
