"""What pico can do beside additions: each of its tasks, with and without thinking.

    python bench/pico_skills.py [MODEL.gguf] [--n 60]

Problems are drawn by the generator of its training with another seed; replies are greedy. Prints
a Markdown table of the share that is right to the letter.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanorun.library import resolve_model
from nanorun.model.chat import GenerateOptions, Message, TextDelta, ToolCall, ToolCallDelta
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import Think
from nanorun.runtime.client import EngineClient

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import pico_tasks as tasks

SEED = 99


@dataclass(frozen=True)
class Problem:
    """A conversation, and the reply that is right: a text or the arguments of a call."""

    messages: list[Message]
    right: str | dict[str, Any]
    tools: tuple[dict[str, Any], ...] = ()


def said(make: Callable[[random.Random], list[dict[str, Any]]]) -> Callable[..., Problem]:
    """Problems whose answer is the last message of a conversation."""

    def draw(rng: random.Random) -> Problem:
        *asked, answer = make(rng)
        return Problem([Message(m["role"], m["content"]) for m in asked], answer["content"])

    return draw


def calculator(rng: random.Random) -> tasks.Conversation:
    """A conversation that needs the calculator."""
    while True:
        conversation = tasks.tool_use(rng, False)
        if conversation.messages[1]["tool_calls"][0]["function"]["name"] == "calculator":
            return conversation


def call(rng: random.Random) -> Problem:
    """To ask the calculator the right thing."""
    c = calculator(rng)
    arguments = c.messages[1]["tool_calls"][0]["function"]["arguments"]
    return Problem([Message("user", c.messages[0]["content"])], arguments, tuple(c.tools))


def result(rng: random.Random) -> Problem:
    """To say what the calculator said."""
    question, asked, told, answer = (c := calculator(rng)).messages
    arguments = asked["tool_calls"][0]["function"]["arguments"]
    messages = [
        Message("user", question["content"]),
        Message("assistant", tool_calls=(ToolCall("c", "calculator", arguments),)),
        Message("tool", told["content"], tool_call_id="c"),
    ]
    return Problem(messages, answer["content"], tuple(c.tools))


SKILLS: dict[str, Callable[[random.Random], Problem]] = {
    "subtraction": said(lambda rng: tasks.subtraction(rng, False)),
    "small talk": said(lambda rng: tasks.small_talk(rng, False)),
    "JSON reply": said(lambda rng: tasks.json_reply(rng, False)),
    "calculator call": call,
    "calculator result": result,
    "one of at most 4 keys": said(lambda rng: tasks.recall(rng, False, 4)),
    "one of at most 24 keys": said(lambda rng: tasks.recall(rng, False, 24)),
    "repeating words and numbers": said(lambda rng: tasks.repeat(rng, False)),
}


async def solve(client: EngineClient, problem: Problem, think: str) -> bool:
    """Whether the reply is the right one."""
    options = GenerateOptions(
        think=Think.parse(think), temperature=0, tools=problem.tools, max_tokens=200
    )
    text, calls = "", []
    async for event in client.generate(problem.messages, options):
        if isinstance(event, TextDelta):
            text += event.text
        elif isinstance(event, ToolCallDelta):
            calls.append(event.call.arguments)
    if isinstance(problem.right, str):
        return text.strip() == problem.right
    return calls == [problem.right]


async def run(model: Path, n: int) -> None:
    """Print a row a skill."""
    client = EngineClient(model, EngineOptions(n_ctx=16384, n_parallel=8))
    print("| task | with thinking | without |")
    print("|---|---|---|")
    try:
        for name, draw in SKILLS.items():
            rng = random.Random(SEED)
            problems = [draw(rng) for _ in range(n)]
            shares = []
            for think in ("high", "off"):
                right = await asyncio.gather(*(solve(client, p, think) for p in problems))
                shares.append(f"{sum(right) / n:.0%}")
            print(f"| {name} | {' | '.join(shares)} |", flush=True)
    finally:
        await client.close()


def main() -> None:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="pico")
    parser.add_argument("--n", type=int, default=60)
    args = parser.parse_args()
    asyncio.run(run(resolve_model(args.model), args.n))


if __name__ == "__main__":
    main()
