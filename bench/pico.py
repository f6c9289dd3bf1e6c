"""pico's accuracy on held-out additions, through nanorun itself.

    python bench/pico.py [--recipes bf16 q8_0 ...] [--n 200] [--think high off ...]

Prints a Markdown table: recipes by reasoning depth.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path

from nanorun.model.chat import GenerateOptions, Message, TextDelta
from nanorun.runtime.client import EngineClient
from nanorun.runtime.options import EngineOptions
from nanorun_converters.convert import ConvertOptions, convert

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pico_tasks import addition_pair  # noqa: E402

N_PARALLEL = 8


async def answer(client: EngineClient, a: int, b: int, think: str) -> str:
    """Pico's answer to one addition, greedy."""
    options = GenerateOptions(think=think, temperature=0.0, max_tokens=200)
    text = ""
    async for event in client.generate([Message("user", f"What is {a} + {b}?")], options):
        if isinstance(event, TextDelta):
            text += event.text
    return text.strip()


async def accuracy(model: Path, think: str, n: int) -> float:
    """Share of `n` held-out additions of up to four digits answered right."""
    rng = random.Random(1)
    pairs = [addition_pair(rng, held_out=True) for _ in range(n)]
    client = EngineClient(model, EngineOptions(n_ctx=4096, n_parallel=N_PARALLEL))
    try:
        answers = await asyncio.gather(*(answer(client, a, b, think) for a, b in pairs))
    finally:
        await client.close()
    return sum(text == str(a + b) for text, (a, b) in zip(answers, pairs, strict=True)) / n


def main() -> None:
    """Convert, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=ROOT / "nanorun" / "data" / "pico")
    parser.add_argument("--recipes", nargs="+", default=["bf16", "q8_0"])
    parser.add_argument("--think", nargs="+", default=["high", "off"])
    parser.add_argument("--n", type=int, default=200)
    args = parser.parse_args()
    print(f"| recipe | bpw | {' | '.join(f'think {t}' for t in args.think)} |")
    print("|" + "---|" * (2 + len(args.think)))
    with tempfile.TemporaryDirectory() as folder:
        for recipe in args.recipes:
            path = Path(folder) / f"pico-{recipe}.gguf"
            result = convert(args.source, ConvertOptions(out=path, recipe=recipe))
            shares = [asyncio.run(accuracy(path, think, args.n)) for think in args.think]
            cells = " | ".join(f"{share:.1%}" for share in shares)
            print(f"| {recipe} | {result.bpw:.2f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
