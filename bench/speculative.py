"""Guessing ahead against plain decoding: the same replies, what was accepted, and the speed.

    python bench/speculative.py MODEL.gguf --how mtp --prompts 100

Replies are greedy and of one stream at a time. Two engines take turns where memory holds the model
twice. With --ignore-differences a reply that differs is counted and is no failure: over a file of
random weights the likeliest tokens lie closer together than rounding.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from nanorun.library import resolve_model
from nanorun.model.chat import Finished, GenerateOptions, Message, TextDelta, ThinkingDelta
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import Think
from nanorun.runtime.client import EngineClient


@dataclass(frozen=True)
class Reply:
    """One reply."""

    text: str
    tps: float
    n_tokens: int
    n_drafted: int
    n_accepted: int


async def ask(client: EngineClient, question: str, args: argparse.Namespace) -> Reply:
    """One greedy reply."""
    options = GenerateOptions(
        think=Think.parse(args.think),
        temperature=0,
        max_tokens=args.tokens,
        ignore_eos=args.ignore_eos,
    )
    text = ""
    async for event in client.generate([Message("user", question)], options):
        if isinstance(event, TextDelta | ThinkingDelta):
            text += event.text
        elif isinstance(event, Finished):
            u = event.usage
            tps = event.timings.decode_tps
            return Reply(text, tps, u.completion_tokens, u.drafted_tokens, u.accepted_tokens)
    raise RuntimeError("the reply did not finish")


async def run(args: argparse.Namespace) -> int:
    """Ask both, print what came of it."""
    model = resolve_model(args.model)
    rng = random.Random(1)
    questions = [
        f"What is {rng.randint(0, 9999)} + {rng.randint(0, 9999)}?" for _ in range(args.prompts)
    ]
    plain_options = EngineOptions(
        n_ctx=4096, n_parallel=1, n_seq_spare=1, n_threads=args.threads, read_ahead=False
    )
    options = replace(plain_options, speculation=args.how, n_draft=args.n_draft)
    clients = [EngineClient(model, plain_options), EngineClient(model, options)]
    fits_twice = psutil.virtual_memory().available > 2.5 * Path(model).stat().st_size
    if fits_twice:
        pairs = [[await ask(client, q, args) for client in clients] for q in questions]
    else:
        columns = []
        for client in clients:
            columns.append([await ask(client, q, args) for q in questions])
            await client.close()
        pairs = [list(pair) for pair in zip(*columns, strict=True)]
    for client in clients:
        await client.close()
    return report(pairs, args)


def report(pairs: list[list[Reply]], args: argparse.Namespace) -> int:
    """Print the figures; 1 if a reply differs."""
    guessed = [b for _, b in pairs]
    n_drafted, n_accepted = sum(r.n_drafted for r in guessed), sum(r.n_accepted for r in guessed)
    n_equal = sum(a.text == b.text for a, b in pairs)
    share = n_accepted / n_drafted if n_drafted else 0.0
    of_all = n_accepted / sum(r.n_tokens for r in guessed)
    ratios = [b.tps / a.tps for a, b in pairs if a.tps and b.tps]
    print(f"{n_equal} of {len(pairs)} replies are equal")
    print(f"{n_drafted} guesses, {share:.1%} accepted: {of_all:.1%} of all tokens")
    print(
        f"plain {statistics.median(a.tps for a, _ in pairs):.1f} t/s, {args.how} "
        f"{statistics.median(b.tps for _, b in pairs):.1f} t/s, "
        f"median ratio {statistics.median(ratios):.2f}"
    )
    return int(n_equal < len(pairs) and not args.ignore_differences)


def main() -> int:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--how", choices=["mtp", "lookup"], default="mtp")
    parser.add_argument("--n-draft", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--think", default="high")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--ignore-differences", action="store_true")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
