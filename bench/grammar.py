"""Decode speed with a JSON Schema against without, on one file.

    python bench/grammar.py MODEL.gguf

The schema asks for a long array of small objects, so that the answer is as long as the free one.
The two take turns; the ratio is the median of the rounds'.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from pathlib import Path

from nanorun.model.chat import Finished, GenerateOptions, Grammar, Message
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import OFF
from nanorun.runtime.client import EngineClient

SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer"},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
    },
}


async def speed(client: EngineClient, grammar: Grammar | None, n_tokens: int) -> float:
    """Tokens a second of one reply, after its first token."""
    options = GenerateOptions(
        think=OFF,
        temperature=0,
        max_tokens=n_tokens,
        grammar=grammar,
        ignore_eos=True,
    )
    async for event in client.generate([Message("user", "List some people.")], options):
        if isinstance(event, Finished):
            return event.timings.decode_tps
    raise RuntimeError("the reply did not finish")


async def run(model: Path, n_tokens: int, n_rounds: int) -> None:
    """Print both speeds and their ratio."""
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    client = EngineClient(model, EngineOptions(n_ctx=4096, n_parallel=1))
    try:
        await speed(client, grammar, 8)  # compiles, and builds the tokenizer
        pairs = [
            (await speed(client, grammar, n_tokens), await speed(client, None, n_tokens))
            for _ in range(n_rounds)
        ]
    finally:
        await client.close()
    held, free = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"with a schema {held:.2f} t/s, without {free:.2f} t/s, ratio {ratio:.3f}")


def main() -> None:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    asyncio.run(run(args.model, args.tokens, args.rounds))


if __name__ == "__main__":
    main()
