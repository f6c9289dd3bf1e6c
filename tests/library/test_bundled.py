"""The bundled models as a newcomer's first command meets them: really converted and checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanorun.library import resolve_model
from nanorun.model.gguf import read_gguf
from nanorun.model.gguf_arch import arch_from_gguf
from nanorun.model.tensor_roles import check_tensors


@pytest.mark.parametrize(("name", "n_layer_nextn"), [("pico", 0), ("pico-mtp", 1)])
def test_bundled_model_becomes_a_whole_gguf_in_the_cache(
    name: str, n_layer_nextn: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANORUN_CACHE_DIR", str(tmp_path))
    path = resolve_model(name)
    file = read_gguf(path)
    arch = arch_from_gguf(file)
    check_tensors(file, arch)
    assert {"M", "E", "*"} == set(arch.pattern)
    assert arch.n_layer_nextn == n_layer_nextn
    assert file.require("general.name", str) == name
    assert file.require("nanorun.recipe", str) == "q8_0"
    assert list((tmp_path / "models").iterdir()) == [path]
