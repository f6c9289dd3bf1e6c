"""A long conversation after a restart: what is read again, and how soon the first token comes.

    python bench/restart.py MODEL.gguf

One engine reads a conversation of some 16,000 tokens, answers, saves its state in idle time and
ends. A second one begins with that state, a third one without any; both get the next question.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from nanorun.model.chat import (
    Finished,
    GenerateOptions,
    Message,
    PrefillProgress,
    TextDelta,
    Usage,
)
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import OFF
from nanorun.runtime.client import EngineClient

OPTIONS = GenerateOptions(think=OFF, temperature=0, max_tokens=64)
SENTENCE = "The sky is blue. Water is wet. Birds can fly. "


async def ask(client: EngineClient, messages: list[Message]) -> tuple[str, float, Usage]:
    """The answer, seconds to its first token (the model is loaded already), and what was read."""
    await client.start()
    started, first, answer = time.perf_counter(), 0.0, ""
    async for event in client.generate(messages, OPTIONS):
        if not isinstance(event, PrefillProgress):
            first = first or time.perf_counter() - started
        if isinstance(event, TextDelta):
            answer += event.text
        elif isinstance(event, Finished):
            return answer, first, event.usage
    raise RuntimeError("the reply did not finish")


async def run(model: Path, n_tokens: int) -> None:
    """Print a row for each way to begin."""
    with tempfile.TemporaryDirectory() as states:
        options = EngineOptions(n_ctx=n_tokens + 2048, n_parallel=1, state_dir=states)
        first = EngineClient(model, options)
        n_sentence = len(await first.tokenize(SENTENCE))
        conversation = [Message("user", SENTENCE * (n_tokens // n_sentence) + "What is 4 + 5?")]
        answer, _, _ = await ask(first, conversation)
        await first.close()
        n_bytes = sum(path.stat().st_size for path in Path(states).iterdir())
        conversation += [Message("assistant", answer), Message("user", "What is 47 + 86?")]
        rows = {}
        for name, how in (("restarted", options), ("anew", replace(options, state_dir=None))):
            client = EngineClient(model, how)
            rows[name] = await ask(client, conversation)
            await client.close()
    print("| | prompt tokens | read | first token s |")
    print("|---|---|---|---|")
    for name, (_, seconds, usage) in rows.items():
        n_read = usage.prompt_tokens - usage.cached_tokens
        print(f"| {name} | {usage.prompt_tokens} | {n_read} | {seconds:.3f} |")
    ratio = rows["anew"][1] / rows["restarted"][1]
    print(f"\n{ratio:.0f} x faster to the first token; {n_bytes / 2**20:.1f} MiB of state on disk")
    if rows["anew"][0] != rows["restarted"][0]:
        raise SystemExit("the two answers differ")


def main() -> None:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=16_384)
    args = parser.parse_args()
    asyncio.run(run(args.model, args.tokens))


if __name__ == "__main__":
    main()
