"""Conversion with an imatrix that knows how inputs go together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nanorun.errors import UsageError
from nanorun.model.engine_options import EngineOptions
from nanorun.model.gguf import read_gguf
from nanorun.runtime.measure.divergence import measure
from nanorun.runtime.measure.imatrix import collect_imatrix
from nanorun_converters.convert import ConvertOptions, ConvertProgress, convert
from nanorun_quant.imatrix_file import read_imatrix, write_imatrix

CALIBRATION = "".join(f"What is {n} + {7 * n % 899}? " for n in range(47, 900, 3))
TEXT = "".join(f"What is {n} + {5 * n % 911}? " for n in range(48, 700, 5))
OPTIONS = EngineOptions(n_threads=1)


@pytest.fixture(scope="module")
def imatrix(pico_f32_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    collect_imatrix(pico_f32_gguf, CALIBRATION, "text", out, 256, OPTIONS, grams=True)
    return out


def test_answers_are_nearer_to_the_source(
    pico_source: Path, pico_f32_gguf: Path, imatrix: Path, tmp_path: Path
) -> None:
    paths = [tmp_path / "never.gguf", tmp_path / "auto.gguf"]
    for path in paths:
        options = ConvertOptions(out=path, recipe="q4_0", imatrix=imatrix, feedback=path.stem)
        convert(pico_source, options)
    plain, better = measure(pico_f32_gguf, paths, TEXT, 256, OPTIONS)
    assert plain.bytes == better.bytes
    assert better.kld_mean < 0.8 * plain.kld_mean
    assert read_gguf(paths[1]).metadata["nanorun.quantizer"] == "ggml, error feedback"


def test_never_means_the_bytes_of_an_imatrix_without_gram_matrices(
    pico_source: Path, imatrix: Path, tmp_path: Path
) -> None:
    (tmp_path / "without").mkdir()
    without = read_imatrix(imatrix)
    without.grams = {}
    write_imatrix(tmp_path / "without" / imatrix.name, without)
    options = {"recipe": "q2", "quantizer": "ggml"}
    for name, file, feedback in (
        ("a", imatrix, "never"), ("b", tmp_path / "without" / imatrix.name, "auto"),
    ):  # fmt: skip
        convert(
            pico_source,
            ConvertOptions(out=tmp_path / name, imatrix=file, feedback=feedback, **options),  # type: ignore[arg-type]
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_stopped_conversion_ends_in_the_same_bytes(
    pico_source: Path, imatrix: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole.gguf", tmp_path / "cut.gguf"

    def options(out: Path) -> ConvertOptions:
        return ConvertOptions(out=out, recipe="q4_0", imatrix=imatrix)

    def stop(progress: ConvertProgress) -> None:
        if progress.n_bytes_done > progress.n_bytes // 2:
            raise KeyboardInterrupt

    convert(pico_source, options(whole))
    with pytest.raises(KeyboardInterrupt):
        convert(pico_source, options(cut), stop)
    convert(pico_source, options(cut))
    assert cut.read_bytes() == whole.read_bytes()


def test_padded_file_gets_it_too(pico_source: Path, imatrix: Path, tmp_path: Path) -> None:
    paths = {mode: tmp_path / f"{mode}.gguf" for mode in ("never", "auto")}
    for mode, path in paths.items():
        options = ConvertOptions(
            out=path, recipe="q4_k", imatrix=imatrix, feedback=mode, pad="always"
        )
        assert convert(pico_source, options).padding["n_embd"] == (320, 512)
    one, other = (
        np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.offset)
        for path in paths.values()
        for tensor in [read_gguf(path).tensors["blk.0.ssm_in.weight"]]
    )
    assert len(one) == len(other)
    assert (one != other).any()


def test_way_that_does_not_exist_is_refused(pico_source: Path) -> None:
    with pytest.raises(UsageError, match="no way of error feedback 'always'"):
        convert(pico_source, ConvertOptions(recipe="q4_0", feedback="always", dry_run=True))
