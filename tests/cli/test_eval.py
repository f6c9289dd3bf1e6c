from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import FakeEngine, Result

Run = Callable[..., Result]


def test_eval_prints_the_perplexity(nanorun: Run, engine: FakeEngine, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three")
    result = nanorun("eval", "pico", "--text", str(text))
    assert result == Result(0, "perplexity 4.5000 over 3 tokens (n_ctx 512)\n", "")


def test_eval_as_json_is_one_object(nanorun: Run, engine: FakeEngine) -> None:
    result = nanorun("eval", "pico", "--text", "-", "--n-ctx", "1k", "--json", stdin="one two")
    assert json.loads(result.out) == {"n_tokens": 2, "ppl": 4.5}
    assert engine.options is not None
    assert engine.options.n_ctx == 1024
    assert engine.client.n_closes == 1


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "holds no text"), (b"\x80", "is not UTF-8 text")]
)
def test_eval_of_what_is_no_text_is_a_usage_error(
    nanorun: Run, engine: FakeEngine, tmp_path: Path, content: bytes, says: str
) -> None:
    path = tmp_path / "data"
    path.write_bytes(content)
    result = nanorun("eval", "pico", "--text", str(path))
    assert result.code == 2
    assert f"{path} {says}" in result.err
    assert engine.client.n_starts == 0


def test_eval_of_a_missing_file_names_it(nanorun: Run, engine: FakeEngine, tmp_path: Path) -> None:
    result = nanorun("eval", "pico", "--text", str(tmp_path / "none"))
    assert result.code == 2
    assert f"{tmp_path / 'none'} cannot be read" in result.err
