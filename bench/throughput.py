"""Decode speed against a bare `llama_decode` loop, at 1, 4 and 8 streams.

    python bench/throughput.py MODEL.gguf

Three ways of making the same tokens on the same file: llama_decode alone with a batch of one token
a stream, the engine in this process (scheduling, sampling, parsing), and the engine in its child
process as everything else uses it. They take turns, so that noise hits all of them; the ratios are
medians over the rounds. Sampling is greedy, prompts are a few tokens long.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import psutil

from nanorun.model.chat import Finished, GenerateOptions, Message
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import OFF
from nanorun.runtime.client import EngineClient
from nanorun.runtime.engine.engine import Engine
from nanorun.runtime.engine.request import Request
from nanorun.runtime.llama.context import Context
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.llama.row import Row
from nanorun.runtime.reply.reply import ReplySettings
from nanorun.runtime.sampling.settings import SamplingSettings

PROMPT = "What is 47 + 86?"
_ids = count()


@dataclass(frozen=True)
class Speed:
    """Tokens a second over all streams, and CPU time of this thread outside llama_decode."""

    tps: float
    outside_us: float = 0.0
    """Microseconds a token."""


def bare(context: Context, recorded: Sequence[list[Row]]) -> Speed:
    """`llama_decode` alone, with the batches that the engine made; only one-token rows count."""
    for seq_id in {row.seq_id for rows in recorded for row in rows}:
        context.drop(seq_id)
    n_made, wall_s = 0, 0.0
    for rows in recorded:
        started = time.perf_counter()
        context.decode(rows)
        if is_decode(rows):
            wall_s += time.perf_counter() - started
            n_made += len(rows)
    return Speed(n_made / wall_s)


def is_decode(rows: Sequence[Row]) -> bool:
    """Whether a batch only continues answers."""
    return all(len(row.tokens) == 1 for row in rows)


class TimedEngine(Engine):
    """An engine that keeps its batches and knows the CPU time it spends in llama_decode."""

    def __init__(self, model: LoadedModel, options: EngineOptions) -> None:
        super().__init__(model, options)
        self.decode_cpu_s = 0.0
        self.recorded: list[list[Row]] = []
        decode = self.context.decode

        def timed(rows):  # type: ignore[no-untyped-def]
            self.recorded.append(list(rows))
            started = time.thread_time()
            try:
                return decode(rows)
            finally:
                self.decode_cpu_s += time.thread_time() - started

        self.context.decode = timed  # type: ignore[method-assign]


def in_process(engine: TimedEngine, prompts: list[list[int]], n_tokens: int) -> Speed:
    """The engine, driven from here."""
    engine.recorded.clear()
    for prompt in prompts:
        settings = ReplySettings(
            SamplingSettings(temperature=0.0), max_tokens=n_tokens + 1, ignore_eos=True
        )
        engine.submit(Request(f"b{next(_ids)}", np.array(prompt, np.int32), (), reply=settings))
    while any(sequence.in_prefill for sequence in (*engine._waiting, *engine._running)):
        engine.step()
    engine.decode_cpu_s = 0.0
    started, cpu_started = time.perf_counter(), time.thread_time()
    n_done = sum(s.reply.n_tokens for s in engine._running if s.reply is not None)
    while engine.busy:
        engine.step()
    wall_s = time.perf_counter() - started
    outside_s = time.thread_time() - cpu_started - engine.decode_cpu_s
    n_made = (n_tokens + 1) * len(prompts) - n_done
    return Speed(n_made / wall_s, outside_s / n_made * 1e6)


async def in_child(client: EngineClient, n_streams: int, n_tokens: int) -> Speed:
    """The engine in its process, its events read here; from the first token to the last."""
    options = GenerateOptions(think=OFF, temperature=0, max_tokens=n_tokens + 1, ignore_eos=True)

    async def one(i: int) -> tuple[float, float]:
        """When the second token came, and when the last."""
        times = []
        async for event in client.generate([Message("user", f"{PROMPT} {i}")], options):
            if not isinstance(event, Finished):
                times.append(time.perf_counter())
        return times[0], times[-1]

    spans = await asyncio.gather(*(one(i) for i in range(n_streams)))
    wall_s = max(end for _, end in spans) - min(start for start, _ in spans)
    return Speed(n_tokens * n_streams / wall_s)


async def measure(model: Path, n_streams: int, n_tokens: int, n_rounds: int, n_threads: int) -> str:
    """One row of the table; the child process takes its turn where memory holds the file twice."""
    options = EngineOptions(
        n_ctx=2048 * n_streams, n_parallel=n_streams, n_seq_spare=0, n_threads=n_threads,
        read_ahead=False,
    )  # fmt: skip
    fits_twice = psutil.virtual_memory().available > 2.5 * model.stat().st_size
    loaded = LoadedModel(model, options)
    engine, context = TimedEngine(loaded, options), Context(loaded, options)
    prompts = [loaded.tokenize(f"{PROMPT} {i}", special=False) for i in range(n_streams)]
    client = EngineClient(model, options)
    if fits_twice:
        await client.start()
    rounds = []
    for _ in range(n_rounds):
        engine.tree.make_room(engine.context.n_ctx)
        made = in_process(engine, prompts, n_tokens)
        alone = bare(context, engine.recorded)
        child = await in_child(client, n_streams, n_tokens) if fits_twice else None
        rounds.append((alone, made, child))
    context.close()
    engine.close()
    await client.close()
    bare_tps = statistics.median(b.tps for b, _, _ in rounds)
    ratio = statistics.median(e.tps / b.tps for b, e, _ in rounds)
    outside = statistics.median(e.outside_us for _, e, _ in rounds)
    ratios = [c.tps / b.tps for b, _, c in rounds if c is not None]
    child_ratio = f"{statistics.median(ratios):.3f}" if ratios else "-"
    return f"| {n_streams} | {bare_tps:.1f} | {ratio:.3f} | {child_ratio} | {outside:.0f} |"


def main() -> None:
    """Print a row for each number of streams."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--tokens", type=int, default=100, help="a stream and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print("| streams | bare llama_decode t/s | engine | child process | CPU µs outside a token |")
    print("|---|---|---|---|---|", flush=True)
    for n_streams in args.streams:
        row = measure(args.model, n_streams, args.tokens, args.rounds, args.threads)
        print(asyncio.run(row), flush=True)


if __name__ == "__main__":
    main()
