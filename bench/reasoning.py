"""Accuracy against the thinking budget, and whether budgets are kept.

    python bench/reasoning.py [MODEL.gguf] [--plot reasoning.svg]

Held-out additions, greedy, one round a budget. Every reply must be well-formed: at most budget +
grace tokens of thinking, then an answer. Exits with 1 if one is not.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from nanorun.library import resolve_model
from nanorun.model.chat import Finished, GenerateOptions, Message, TextDelta
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import Think, grace_tokens
from nanorun.runtime.client import EngineClient

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from pico_tasks import addition_pair

BUDGETS = (0, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 64, 24, 56, 56


@dataclass(frozen=True)
class Point:
    """One budget's outcome."""

    budget: int
    accuracy: float
    mean_thinking: float
    most_thinking: int
    n_malformed: int


async def measure(client: EngineClient, budget: int, n: int) -> Point:
    """Ask `n` additions with one budget."""
    rng = random.Random(1)
    pairs = [addition_pair(rng, held_out=True) for _ in range(n)]

    async def one(a: int, b: int) -> tuple[str, Finished]:
        options = GenerateOptions(think=Think.parse(budget), temperature=0.0, max_tokens=400)
        text = ""
        async for event in client.generate([Message("user", f"What is {a} + {b}?")], options):
            if isinstance(event, TextDelta):
                text += event.text
            elif isinstance(event, Finished):
                return text.strip(), event
        raise RuntimeError("a reply did not finish")

    replies = await asyncio.gather(*(one(a, b) for a, b in pairs))
    thinking = [finished.usage.thinking_tokens for _, finished in replies]
    limit = budget + grace_tokens(budget) if budget else 0
    return Point(
        budget,
        sum(text == str(a + b) for (text, _), (a, b) in zip(replies, pairs, strict=True)) / n,
        sum(thinking) / n,
        max(thinking),
        sum(t > limit or not text for t, (text, _) in zip(thinking, replies, strict=True)),
    )


def plot(points: list[Point], title: str) -> str:
    """Accuracy against the budget, as SVG."""
    most = max(point.budget for point in points)
    x = lambda budget: LEFT + (WIDTH - LEFT - RIGHT) * budget / most  # noqa: E731
    y = lambda share: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share  # noqa: E731
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="28" font-size="16" font-weight="600" fill="#1b1f24">{title}</text>',
    ]
    for tick in range(0, 101, 25):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick / 100):.1f}" '
            f'y2="{y(tick / 100):.1f}" stroke="#e3e6ea"/>'
            f'<text x="{LEFT - 10}" y="{y(tick / 100) + 4:.1f}" text-anchor="end" '
            f'fill="#57606a">{tick} %</text>'
        )
    for budget in range(0, most + 1, 8):
        parts.append(
            f'<text x="{x(budget):.1f}" y="{HEIGHT - BOTTOM + 22}" text-anchor="middle" '
            f'fill="#57606a">{budget}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle" '
        'fill="#1b1f24">budget of thinking tokens</text>'
    )
    path = " ".join(f"{x(p.budget):.1f},{y(p.accuracy):.1f}" for p in points)
    parts.append(f'<polyline points="{path}" fill="none" stroke="#76b900" stroke-width="3"/>')
    for point in points:
        parts.append(
            f'<circle cx="{x(point.budget):.1f}" cy="{y(point.accuracy):.1f}" r="5" '
            f'fill="#76b900"><title>{point.budget}: {point.accuracy:.1%}</title></circle>'
        )
    return "\n".join([*parts, "</svg>\n"])


async def run(model: Path, n: int) -> list[Point]:
    """Print a row a budget."""
    client = EngineClient(model, EngineOptions(n_ctx=4096, n_parallel=8))
    print("| budget | right | mean thinking | most thinking | limit | malformed |")
    print("|---|---|---|---|---|---|", flush=True)
    points = []
    try:
        for budget in BUDGETS:
            p = await measure(client, budget, n)
            points.append(p)
            limit = budget + grace_tokens(budget) if budget else 0
            print(
                f"| {budget} | {p.accuracy:.1%} | {p.mean_thinking:.1f} | {p.most_thinking} "
                f"| {limit} | {p.n_malformed} |",
                flush=True,
            )
    finally:
        await client.close()
    return points


def main() -> int:
    """Read the flags, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="pico")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    points = asyncio.run(run(resolve_model(args.model), args.n))
    if args.plot is not None:
        title = f"{args.n} additions that {Path(args.model).stem} was not trained on"
        args.plot.write_text(plot(points, title), encoding="utf-8")
    return int(any(point.n_malformed for point in points))


if __name__ == "__main__":
    sys.exit(main())
