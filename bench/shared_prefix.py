"""Eight requests at once with a shared prefix of about 4,000 tokens and different tails.

    PEER_PYTHON=... python bench/shared_prefix.py MODEL.gguf

Both servers have eight slots and the same threads; an answer has one token, so the time is that of
reading. Prints the total time of both, their ratio, and the prompt tokens that were read.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from servers import Reply, Server, nanorun_server, peer_server

from nanorun.model.chat import GenerateOptions, Message
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import OFF
from nanorun.runtime.client import EngineClient

N_REQUESTS = 8
PREFIX = "The sky is blue. Water is wet. Birds can fly. Fish can swim. Trees are tall. " * 175
TAIL = " Night is dark. Snow is cold. The sun is warm." * 7


def prompts() -> list[str]:
    """One prefix, different tails."""
    return [f"{PREFIX} {i * 1111 + 7}{TAIL} What is {i} + {i}?" for i in range(N_REQUESTS)]


def burst(server: Server) -> tuple[float, list[Reply]]:
    """All requests at once; seconds until the last is answered."""
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts()]
    with ThreadPoolExecutor(N_REQUESTS) as pool:
        started = time.perf_counter()
        replies = list(pool.map(lambda m: server.ask(m, n_thinking=0, n_answer=1), messages))
        return time.perf_counter() - started, replies


async def cells_used(model: Path, n_ctx: int) -> tuple[int, int]:
    """KV cells that the same requests leave in use, and the tokens of the prefix."""
    client = EngineClient(model, EngineOptions(n_ctx=n_ctx, n_parallel=N_REQUESTS))
    options = GenerateOptions(think=OFF, max_tokens=1)

    async def ask(text: str) -> None:
        async for _ in client.generate([Message("user", text)], options):
            pass

    await client.start()
    try:
        await asyncio.gather(*map(ask, prompts()))
        return (await client.stats()).n_cells_used, len(await client.tokenize(PREFIX))
    finally:
        await client.close()


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
    n_cells, n_prefix = asyncio.run(cells_used(args.model, args.n_ctx))
    print(
        f"nanorun: {n_cells} KV cells in use, {n_cells / n_prefix:.2f} of the prefix's {n_prefix}"
    )


if __name__ == "__main__":
    main()
