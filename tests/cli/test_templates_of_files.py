"""`nanorun run` of files whose chat template makes no prompt: said, where it once hung."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nanorun.errors import ExitCode
from nanorun_converters.convert import convert
from nanorun_converters.family import metadata
from nanorun_converters.options import ConvertOptions
from nanorun_converters.output.gguf_header import string
from tests.support.source_models import write_source_model


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("", "has no chat template"),
        (" \n", "has no chat template"),
        ("\ufeff", "has no chat template"),
        ("{# nothing #}", "makes no prompt of these messages"),
        ("{% for m in [] %}{{ m }}{% endfor %}", "makes no prompt of these messages"),
    ],
)
def test_template_that_makes_no_prompt_is_refused(
    template: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    # As files of others have them: nanorun itself writes no empty template.
    keys = {metadata.TEMPLATE_KEY: string(template)}
    monkeypatch.setattr(metadata, "_templates", lambda _vocabulary: keys)
    convert(write_source_model(tmp_path / "source"), ConvertOptions(out=path))
    command = [sys.executable, "-m", "nanorun", "run", str(path), "hello", "--max-tokens", "2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == ExitCode.MODEL
    assert f"model.gguf {problem}" in run.stderr
