"""The bundled model as a newcomer's first command meets it: really converted, really checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanorun.library import resolve_model
from nanorun.model.arch import arch_from_gguf
from nanorun.model.gguf import read_gguf
from nanorun.model.tensor_roles import check_tensors


def test_pico_becomes_a_whole_gguf_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANORUN_CACHE_DIR", str(tmp_path))
    path = resolve_model("pico")
    file = read_gguf(path)
    arch = arch_from_gguf(file)
    check_tensors(file, arch)
    assert {"M", "E", "*"} == set(arch.pattern)
    assert file.require("nanorun.recipe", str) == "q8_0"
    assert list((tmp_path / "models").iterdir()) == [path]
