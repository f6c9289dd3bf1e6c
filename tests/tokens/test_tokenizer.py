"""Token ids are those of the `tokenizers` library on tokenizer.json, for every script."""

from __future__ import annotations

import json
import random
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library

from nanorun.model.gguf import read_gguf
from nanorun.tokens.definition import KEY_JSON
from nanorun.tokens.families import FAMILIES
from nanorun.tokens.tokenizer import TrainedTokenizer, trained_tokenizer
from tests.chat.conftest import CONTROL_TOKENS

Metadata = dict[str, Any]


@pytest.fixture(scope="module")
def metadata(pico_gguf: Path) -> Metadata:
    return read_gguf(pico_gguf).metadata


@pytest.fixture(scope="module", params=["carried", "rebuilt"])
def tokenizer(request: pytest.FixtureRequest, metadata: Metadata) -> TrainedTokenizer:
    left_out = KEY_JSON if request.param == "rebuilt" else ""
    found = trained_tokenizer({key: v for key, v in metadata.items() if key != left_out})
    assert found is not None
    return found


@pytest.fixture(scope="module")
def reference(pico_source: Path) -> Any:
    return Library.from_file(str(pico_source / "tokenizer.json"))


def reference_ids(reference: Any, text: str, *, special: bool) -> list[int]:
    reference.encode_special_tokens = not special
    ids: list[int] = reference.encode(text, add_special_tokens=False).ids
    return ids


def letters_by_script() -> dict[str, list[str]]:
    """Letters and marks by the first word of their names, which is the script's."""
    found: dict[str, list[str]] = {}
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if unicodedata.category(char)[0] in "LM":
            script = unicodedata.name(char, "").split(" ")[0]
            found.setdefault(script, []).append(char)
    return {script: chars for script, chars in found.items() if len(chars) >= 20}


def sentences() -> Iterator[str]:
    """Made-up sentences, 20 for each script: words of letters and marks, spaces, full stops."""
    rng = random.Random(11)
    for chars in letters_by_script().values():
        for _ in range(20):
            words = ["".join(rng.choices(chars, k=rng.randint(1, 8))) for _ in range(6)]
            yield " ".join(words) + rng.choice(".!?।\n")


def mixes(n: int) -> Iterator[str]:
    rng = random.Random(12)
    usual = [chr(i) for i in range(9, 0x250)] + list(CONTROL_TOKENS) + [" ", "\n", "\r\n", "/"]
    for _ in range(n):
        anywhere = [chr(rng.randrange(0x110000)) for _ in range(6)]
        chars = rng.choices([*usual, *anywhere * 40], k=rng.randint(1, 24))
        yield "".join(char for char in chars if not "\ud800" <= char <= "\udfff")


def assert_same(tokenizer: TrainedTokenizer, reference: Any, text: str) -> None:
    for special in (True, False):
        expected = reference_ids(reference, text, special=special)
        assert tokenizer.encode(text, special=special) == expected, repr(text)


def test_sentences_of_all_scripts(tokenizer: TrainedTokenizer, reference: Any) -> None:
    texts = list(sentences())
    assert len(texts) >= 2000
    for text in texts:
        assert_same(tokenizer, reference, text)
        assert_same(tokenizer, reference, unicodedata.normalize("NFD", text))


def test_mixes_of_code_points(tokenizer: TrainedTokenizer, reference: Any) -> None:
    for text in mixes(3000):
        assert_same(tokenizer, reference, text)


@pytest.mark.slow
def test_many_mixes_of_code_points(tokenizer: TrainedTokenizer, reference: Any) -> None:
    for text in mixes(100_000):
        assert_same(tokenizer, reference, text)


def test_long_text_is_cut_without_a_trace(tokenizer: TrainedTokenizer, reference: Any) -> None:
    rng = random.Random(13)
    lines = [*sentences(), "", "  ", "\t x", "//", "1", " \r", "'s", "<think>"]
    text = "\n".join(rng.choices(lines, k=9000))
    assert len(text) > 2**18
    assert_same(tokenizer, reference, text)


@pytest.mark.parametrize("pre", ["tekken", "llama-bpe", "gpt-2"])
def test_file_of_others_is_rebuilt(pre: str, metadata: Metadata, pico_source: Path) -> None:
    definition = json.loads((pico_source / "tokenizer.json").read_text(encoding="utf-8"))
    definition["pre_tokenizer"] = FAMILIES[pre].pre_tokenizer()
    definition["model"]["ignore_merges"] = pre != "gpt-2"
    foreign = {key: value for key, value in metadata.items() if key != KEY_JSON}
    tokenizer = trained_tokenizer({**foreign, "tokenizer.ggml.pre": pre})
    assert tokenizer is not None
    reference = Library.from_str(json.dumps(definition))
    for text in [*sentences(), *mixes(500)]:
        assert_same(tokenizer, reference, text)


def test_unknown_pre_tokenizer_is_not_guessed(metadata: Metadata) -> None:
    foreign = {key: value for key, value in metadata.items() if key != KEY_JSON}
    assert trained_tokenizer({**foreign, "tokenizer.ggml.pre": "of-nobody"}) is None


@pytest.mark.parametrize("damaged", ["", "{", "[" * 100_000, '{"model": 3}', "7", "{}"])
def test_damaged_json_in_a_file_is_passed_over(
    damaged: str, metadata: Metadata, reference: Any
) -> None:
    tokenizer = trained_tokenizer({**metadata, KEY_JSON: damaged})
    assert tokenizer is not None
    assert_same(tokenizer, reference, "e\u0301<tool हिन्दी <think>")


def test_json_of_another_vocabulary_is_passed_over(metadata: Metadata, reference: Any) -> None:
    other = json.loads(metadata[KEY_JSON])
    vocab = other["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    tokenizer = trained_tokenizer({**metadata, KEY_JSON: json.dumps(other)})
    assert tokenizer is not None
    assert_same(tokenizer, reference, "abba")


@pytest.mark.parametrize("special", [True, False])
def test_typed_tag_that_is_user_defined_is_text(metadata: Metadata, special: bool) -> None:
    i = metadata["tokenizer.ggml.tokens"].index("<think>")
    types = list(metadata["tokenizer.ggml.token_type"])
    types[i] = 4
    definition = json.loads(metadata[KEY_JSON])
    for token in definition["added_tokens"]:
        token["special"] = token["special"] and token["content"] != "<think>"
    for carried in (json.dumps(definition), ""):
        changed = {**metadata, "tokenizer.ggml.token_type": types, KEY_JSON: carried}
        tokenizer = trained_tokenizer(changed)
        assert tokenizer is not None
        assert (i in tokenizer.encode("a <think> b", special=special)) is special


def test_lone_surrogate_is_a_question_mark(tokenizer: TrainedTokenizer) -> None:
    assert tokenizer.encode("a\ud800", special=False) == tokenizer.encode("a?", special=False)


def test_pieces_give_the_text_back(tokenizer: TrainedTokenizer) -> None:
    for text in sentences():
        ids = tokenizer.encode(text, special=False)
        assert b"".join(map(tokenizer.piece, ids)).decode() == text
