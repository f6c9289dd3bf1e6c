"""pico's accuracy on held-out additions, through nanorun itself: recipes by reasoning depth.

    python bench/pico.py [--recipes bf16 q8_0 ...] [--n 200] [--think high off ...] [--update]

Prints a Markdown table; with `--update` also writes it into pico's README.md. All recipes
get an importance matrix, of 100 of pico's own conversations; NAME+feedback is the recipe with error
feedback.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nanorun.model.chat import GenerateOptions, Message, TextDelta
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import Think
from nanorun.runtime.client import EngineClient
from nanorun.runtime.measure.imatrix import collect_imatrix
from nanorun_converters.convert import ConvertOptions, convert

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "bench")]
from pico_tasks import addition_pair  # noqa: E402

from quant import conversations  # noqa: E402

N_PARALLEL = 8
N_CONVERSATIONS = 100
# From nearly lossless down to where it falls apart.
RECIPES = ("bf16", "q8_0", "q5", "q4", "iq4_nl", "mxfp4", "16g", "q3", "12g", "q2", "q2_0",
           "q2_0+feedback")  # fmt: skip
README = ROOT / "nanorun" / "data" / "pico" / "README.md"
BEGIN, END = "<!-- bench/pico.py -->", "<!-- /bench/pico.py -->"


async def answer(client: EngineClient, a: int, b: int, think: str) -> str:
    """Pico's answer to one addition, greedy."""
    options = GenerateOptions(think=Think.parse(think), temperature=0.0, max_tokens=200)
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


def imatrix_of(source: Path, folder: Path) -> Path:
    """An importance matrix of pico on conversations of its own kind."""
    model, out = folder / "for-imatrix.gguf", folder / "imatrix.gguf"
    convert(source, ConvertOptions(out=model, recipe="f32"))
    text = conversations(source, 1, N_CONVERSATIONS)
    collect_imatrix(model, text, "pico", out, 512, EngineOptions(), special=True, grams=True)
    return out


def rows(args: argparse.Namespace) -> Iterator[str]:
    """The lines of the table, each as soon as it is known."""
    names = [f"thinking {t}" if t != "off" else "no thinking" for t in args.think]
    yield f"| recipe | bpw | {' | '.join(names)} |"
    yield "|" + "---|" * (2 + len(args.think))
    with tempfile.TemporaryDirectory() as folder:
        imatrix = imatrix_of(args.source, Path(folder))
        for name in args.recipes:
            path = Path(folder) / f"pico-{name}.gguf"
            recipe, plus, _ = name.partition("+")
            options = ConvertOptions(
                out=path, recipe=recipe, imatrix=imatrix, feedback="auto" if plus else "never"
            )
            result = convert(args.source, options)
            shares = [asyncio.run(accuracy(path, think, args.n)) for think in args.think]
            cells = " | ".join(f"{share:.1%}" for share in shares)
            yield f"| {name.replace('+', ', ')} | {result.bpw:.2f} | {cells} |"
            path.unlink()


def update(readme: Path, table: list[str]) -> None:
    """Put the table where the README has its place for it."""
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{readme}: expected {BEGIN} and {END}")
    middle = "\n".join(["", *table, ""])
    readme.write_text(f"{before}{BEGIN}{middle}{END}{after}", encoding="utf-8")


def main() -> None:
    """Convert, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=README.parent)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--think", nargs="+", default=["high", "off"])
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--update", action="store_true")
    args = parser.parse_args()
    table = []
    for row in rows(args):
        table.append(row)
        print(row, flush=True)
    if args.update:
        update(README, table)


if __name__ == "__main__":
    main()
