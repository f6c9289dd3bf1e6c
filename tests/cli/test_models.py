from __future__ import annotations

from pathlib import Path

import pytest

from nanorun.cli.models import context_size, display_name
from nanorun.errors import ModelError, UsageError

PATH = Path("tiny.gguf")


@pytest.fixture(autouse=True)
def trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanorun.cli.models.trained_n_ctx", lambda _path: 4096)


@pytest.mark.parametrize(
    ("text", "n_ctx"), [(None, 4096), ("max", 4096), ("MAX ", 4096), ("2k", 2048), ("8192", 8192)]
)
def test_context_is_what_is_asked_or_what_the_model_knows(text: str | None, n_ctx: int) -> None:
    assert context_size(text, PATH) == n_ctx


def test_context_by_default_is_not_the_whole_of_what_the_model_knows() -> None:
    assert context_size(None, PATH, default=512) == 512


def test_context_beyond_training_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    context_size("8k", PATH)
    assert capsys.readouterr().err == (
        "nanorun: n_ctx 8192 is beyond the 4096 tokens that tiny.gguf was trained for\n"
    )


def test_context_that_is_no_number_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="'many'"):
        context_size("many", PATH)


def test_context_of_a_file_that_is_no_model_is_a_model_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    path = tmp_path / "no.gguf"
    path.write_bytes(b"not a model, but long enough to be read as a header")
    with pytest.raises(ModelError, match=r"no\.gguf"):
        context_size(None, path)


@pytest.mark.parametrize(
    ("model", "name"),
    [("pico", "pico"), ("nano:16g", "nano:16g"), ("/a/b/nano-q8_0.gguf", "nano-q8_0")],
)
def test_name_is_short(model: str, name: str) -> None:
    assert display_name(model) == name
