"""A vocabulary of real size: Mistral's tekken, 131,072 tokens, as `mistral-common` carries it.

The ids must be those of `tiktoken`, with which that package itself makes them. Neither is needed
for development: `pip install mistral-common tiktoken` brings this test to life.
"""

from __future__ import annotations

import base64
import json
import random
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from nanorun.tokens.token_list import Kind
from nanorun.tokens.tokenizer import TrainedTokenizer, trained_tokenizer
from tests.tokens.test_tokenizer import mixes, sentences

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

N_VOCAB = 131_072
N_SPECIAL = 1000


@pytest.fixture(scope="module")
def tekken() -> dict[str, Any]:
    package = find_spec("mistral_common")
    if package is None or package.origin is None or find_spec("tiktoken") is None:
        pytest.skip("mistral-common and tiktoken are not installed")
    path = Path(package.origin).parent / "data" / "tekken_240911.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert found["config"]["default_vocab_size"] == N_VOCAB
    assert found["config"]["default_num_special_tokens"] == N_SPECIAL
    return found


@pytest.fixture(scope="module")
def ranks(tekken: dict[str, Any]) -> dict[bytes, int]:
    entries = tekken["vocab"][: N_VOCAB - N_SPECIAL]
    return {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries}


@pytest.fixture(scope="module")
def reference(tekken: dict[str, Any], ranks: dict[bytes, int]) -> Any:
    import tiktoken

    pattern = tekken["config"]["pattern"]
    return tiktoken.Encoding("tekken", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


@pytest.fixture(scope="module")
def tokenizer(ranks: dict[bytes, int]) -> TrainedTokenizer:
    """As a GGUF has it: tokens, merges and the name of the pre-tokenizer."""
    letters = byte_letters()
    in_order = sorted(ranks, key=ranks.__getitem__)
    spell = {token: "".join(letters[byte] for byte in token) for token in in_order}
    specials = [f"<SPECIAL_{i}>" for i in range(N_SPECIAL)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "tekken",
        "tokenizer.ggml.tokens": [*specials, *spell.values()],
        "tokenizer.ggml.token_type": [Kind.CONTROL] * N_SPECIAL + [Kind.NORMAL] * len(ranks),
        "tokenizer.ggml.merges": [
            f"{spell[left]} {spell[right]}"
            for token in in_order
            for left, right in halves(token, ranks)
        ],
    }
    found = trained_tokenizer(metadata)
    assert found is not None
    return found


def halves(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs of tokens that a token can be merged from, the earliest first."""
    pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
    known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
    return sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(b if b in shown else 256 + hidden.index(b)) for b in range(256)]


def test_ids_are_those_of_its_makers(tokenizer: TrainedTokenizer, reference: Any) -> None:
    texts = [*sentences(), *islice(mixes(20_000), 20_000)]
    assert len(texts) > 20_000
    for text in texts:
        expected = [token + N_SPECIAL for token in reference.encode_ordinary(text)]
        assert tokenizer.encode(text, special=False) == expected, repr(text)


def test_long_text(tokenizer: TrainedTokenizer, reference: Any) -> None:
    rng = random.Random(14)
    text = "\n".join(rng.choices(list(sentences()), k=20_000))
    expected = [token + N_SPECIAL for token in reference.encode_ordinary(text)]
    assert tokenizer.encode(text, special=False) == expected
