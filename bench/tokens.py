"""Speed of tokenizing, the `tokenizers` library against llama.cpp's tokenizer, on one file.

    python bench/tokens.py MODEL.gguf

The two take turns on the same text; the ratio is the median of the rounds'.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.llama.engine_tokenizer import EngineTokenizer
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.tokens.token_list import TokenList
from nanorun.tokens.tokenizer import Tokenizer

LINES = (
    "The quick fox doesn't jump over 12 lazy dogs; it's fine.\n"
    "def f(x: int) -> dict[str, int]:\n\treturn {**x, 'a_b': x // 2}  # ok\n"
    "Привет, мир! 日本語のテスト。 हिन्दी में एक वाक्य।\n"
)


def seconds(tokenizer: Tokenizer, text: str) -> float:
    """Time that tokenizing a text takes."""
    started = time.perf_counter()
    tokenizer.encode(text, special=False)
    return time.perf_counter() - started


def main() -> None:
    """Print both speeds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model = LoadedModel(arguments.model, EngineOptions())
    theirs = EngineTokenizer(model._llama, model.vocab, TokenList.from_metadata(model.metadata))
    text = LINES * (2**20 // len(LINES.encode()))
    pairs = [
        (seconds(model.tokenizer, text), seconds(theirs, text)) for _ in range(arguments.rounds)
    ]
    own, engine = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(e / o for o, e in pairs)
    print(f"1 MiB: {own:.3f} s; llama.cpp {engine:.3f} s; ratio {ratio:.2f}")
    model.close()


if __name__ == "__main__":
    main()
