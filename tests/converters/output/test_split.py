"""Split files: llama.cpp's names and keys, no file too large, and the engine opens the first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nanorun.errors import UsageError
from nanorun.model.gguf import read_gguf, read_part
from nanorun_converters.convert import ConvertOptions, convert
from nanorun_converters.output.gguf_header import split_paths
from tests.converters.transformers_reference import engine_logits
from tests.support.source_models import write_source_model

TOKENS = list(range(32, 64))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source_model(tmp_path / "source")


def split(source: Path, out: Path, max_bytes: int, **options: object) -> list[Path]:
    options = {"out": out, "split_max_bytes": max_bytes, **options}
    convert(source, ConvertOptions(**options))  # type: ignore[arg-type]
    return sorted(out.parent.glob(f"{out.stem}*.gguf"))


@pytest.mark.parametrize("max_bytes", [60_000, 120_000, 500_000])
def test_engine_computes_the_same_from_split_files(
    max_bytes: int, source: Path, tmp_path: Path
) -> None:
    convert(source, ConvertOptions(out=tmp_path / "whole.gguf"))
    files = split(source, tmp_path / "model.gguf", max_bytes)
    assert files == split_paths(tmp_path / "model.gguf", len(files))
    assert max(path.stat().st_size for path in files) <= max_bytes
    found = engine_logits(files[0], TOKENS)
    np.testing.assert_array_equal(found, engine_logits(tmp_path / "whole.gguf", TOKENS))


def test_files_say_which_of_how_many_they_are(source: Path, tmp_path: Path) -> None:
    files = split(source, tmp_path / "model.gguf", 120_000)
    ggufs = [read_part(path) for path in files]
    convert(source, ConvertOptions(out=tmp_path / "whole.gguf"))
    whole = read_gguf(tmp_path / "whole.gguf")
    assert [name for gguf in ggufs for name in gguf.tensors] == list(whole.tensors)
    for i, gguf in enumerate(ggufs):
        assert gguf.metadata["split.no"] == i
        assert gguf.metadata["split.count"] == len(files)
        assert gguf.metadata["split.tensors.count"] == len(whole.tensors)
    assert ggufs[0].metadata.keys() - whole.metadata.keys() == {
        "split.no", "split.count", "split.tensors.count",
    }  # fmt: skip
    assert len(ggufs[1].metadata) == 3


def test_model_that_fits_is_not_split(source: Path, tmp_path: Path) -> None:
    files = split(source, tmp_path / "model.gguf", 10**9)
    assert [path.name for path in files] == ["model.gguf"]
    assert "split.no" not in read_gguf(files[0]).metadata


def test_tensor_larger_than_a_file_may_be_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"too small: .* alone makes a file of \d+") as caught:
        split(source, tmp_path / "model.gguf", 30_000)
    least = int(caught.value.message.split()[-2])
    assert split(source, tmp_path / "model.gguf", least)
    assert not list(tmp_path.glob("*.part*"))


def test_existing_file_of_a_split_is_kept_unless_forced(source: Path, tmp_path: Path) -> None:
    files = split(source, tmp_path / "model.gguf", 120_000)
    files[0].unlink()
    with pytest.raises(UsageError, match="00002-of-"):
        split(source, tmp_path / "model.gguf", 120_000)
    split(source, tmp_path / "model.gguf", 120_000, force=True)


@pytest.mark.parametrize(
    ("name", "second"),
    [("m.gguf", "m-00002-of-00003.gguf"), ("m", "m-00002-of-00003.gguf"),
     ("a.b.gguf", "a.b-00002-of-00003.gguf")],
)  # fmt: skip
def test_names_are_those_of_llama_cpp(name: str, second: str) -> None:
    assert split_paths(Path(name), 3)[1] == Path(second)
