"""Whether a seed gives the same text alone and among seven other streams.

    python bench/seeds.py MODEL.gguf

Where it does not, it is floating point: a matrix product over eight rows adds up in another order
than one over a single row, so logits differ in their last digits, and a draw that falls between
two tokens may fall on the other one. Prints how many texts are equal, how far the others agree,
and the same for greedy replies.
"""

from __future__ import annotations

import argparse
import asyncio
from itertools import takewhile
from pathlib import Path

from nanorun.library import resolve_model
from nanorun.model.chat import GenerateOptions, Message, TextDelta
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import OFF
from nanorun.runtime.client import EngineClient


async def text(client: EngineClient, question: str, options: GenerateOptions) -> str:
    """One answer."""
    answer = ""
    async for event in client.generate([Message("user", question)], options):
        if isinstance(event, TextDelta):
            answer += event.text
    return answer


async def run(model: Path, n_seeds: int, n_tokens: int) -> None:
    """Print a row for each way of picking tokens."""
    how = {"read_ahead": False, "n_seq_spare": 0, "checkpoint_bytes": 0, "archive_bytes": 0}
    client = EngineClient(model, EngineOptions(n_ctx=16384, n_parallel=8, **how))  # type: ignore[arg-type]
    others = [f"What is {100 + i} + {900 - 7 * i}?" for i in range(7)]
    print("| temperature | repeated alone | among 7 others | shortest common beginning |")
    print("|---|---|---|---|")
    try:
        for temperature in (0.0, 1.0, 1.5):
            alone_equal, among_equal, common = 0, 0, n_tokens * 10
            for seed in range(n_seeds):
                options = GenerateOptions(
                    think=OFF, temperature=temperature, seed=seed, max_tokens=n_tokens,
                    ignore_eos=True,
                )  # fmt: skip
                question = f"Tell me about {seed}."
                alone = await text(client, question, options)
                again = await text(client, question, options)
                texts = await asyncio.gather(
                    text(client, question, options), *(text(client, q, options) for q in others)
                )
                alone_equal += alone == again
                among_equal += alone == texts[0]
                if alone != texts[0]:
                    pairs = zip(alone, texts[0], strict=False)
                    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                    common = min(common, same)
            shortest = "all" if among_equal == n_seeds else f"{common} characters"
            print(
                f"| {temperature} | {alone_equal} of {n_seeds} | {among_equal} of {n_seeds} "
                f"| {shortest} |",
                flush=True,
            )
    finally:
        await client.close()


def main() -> None:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="pico")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=100)
    args = parser.parse_args()
    asyncio.run(run(resolve_model(args.model), args.seeds, args.tokens))


if __name__ == "__main__":
    main()
