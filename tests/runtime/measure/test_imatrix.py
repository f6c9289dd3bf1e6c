"""Collecting an importance matrix from a running model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanorun.errors import UsageError
from nanorun.model.engine_options import EngineOptions
from nanorun.model.gguf import read_gguf
from nanorun.runtime.measure.imatrix import collect_here, collect_imatrix
from nanorun.runtime.measure.perplexity import Source
from nanorun_converters.convert import ConvertOptions, convert
from nanorun_quant.imatrix_file import read_imatrix
from tests.support.source_models import write_source_model

TEXT = "What is 47 + 86? " * 60
OPTIONS = EngineOptions(n_threads=1)


def test_every_matrix_of_the_blocks_is_seen_and_experts_apart(
    pico_f32_gguf: Path, tmp_path: Path
) -> None:
    out = tmp_path / "i.gguf"
    imatrix = collect_imatrix(pico_f32_gguf, TEXT, "text.txt", out, 64, OPTIONS)
    names = {
        tensor.name
        for tensor in read_gguf(pico_f32_gguf).tensors.values()
        if len(tensor.shape) > 1 and "norm" not in tensor.name and "ssm_c" not in tensor.name
        and not tensor.name.endswith(("ssm_a", "ssm_d", "token_embd.weight"))
    }  # fmt: skip
    assert imatrix.entries.keys() == names
    n_tokens = imatrix.n_chunks * 64
    experts = imatrix.entries["blk.1.ffn_up_exps.weight"]
    assert experts.sums.shape == (8, 320)
    assert experts.counts.sum() == 2 * n_tokens
    assert imatrix.entries["output.weight"].counts.tolist() == [n_tokens]
    assert read_imatrix(out).n_chunks == imatrix.n_chunks


def test_first_matrix_sees_the_normalized_embeddings(pico_f32_gguf: Path, tmp_path: Path) -> None:
    """Computed anew, by hand: squares of RMS-normed embeddings times the norm's weight."""
    from nanorun.runtime.llama.loaded_model import LoadedModel

    imatrix = collect_imatrix(pico_f32_gguf, TEXT, "t", tmp_path / "i.gguf", 32, OPTIONS)
    model = LoadedModel(pico_f32_gguf, OPTIONS)
    tokens = model.tokenize(TEXT, special=False)[: 32 * imatrix.n_chunks]
    model.close()
    tensors = read_gguf(pico_f32_gguf).tensors

    def numbers(name: str) -> np.ndarray:
        tensor = tensors[name]
        flat = np.fromfile(pico_f32_gguf, "<f4", tensor.n_elements, offset=tensor.offset)
        return flat.reshape(tensor.shape)

    x = numbers("token_embd.weight")[tokens].astype(np.float64)
    x = x / np.sqrt(np.square(x).mean(1, keepdims=True) + 1e-5)
    expected = np.square(x * numbers("blk.0.attn_norm.weight")).sum(0)
    found = imatrix.entries["blk.0.ssm_in.weight"].sums[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_gram_matrices_are_of_the_inputs_whose_squares_are_summed(
    pico_f32_gguf: Path, tmp_path: Path
) -> None:
    out = tmp_path / "i.gguf"
    imatrix = collect_imatrix(pico_f32_gguf, TEXT, "t", out, 64, OPTIONS, grams=True)
    blocks = {"M": ("ssm_in", "ssm_out"), "*": ("attn_q", "attn_output"),
              "E": ("ffn_up_shexp", "ffn_down_shexp")}  # fmt: skip
    expected = {f"blk.{i}.{role}.weight" for i, kind in enumerate("MEM*EM*E")
                for role in blocks[kind]}  # fmt: skip
    assert imatrix.grams.keys() == expected | {"output.weight"}
    for name, gram in imatrix.grams.items():
        np.testing.assert_allclose(gram, gram.T, rtol=1e-3, atol=1e-3 * gram.max())
        np.testing.assert_allclose(np.diag(gram), imatrix.entries[name].sums[0], rtol=1e-4)
        assert np.abs(gram - np.diag(np.diag(gram))).max() > 0


def test_experts_that_read_a_latent_share_its_gram_matrix(tmp_path: Path) -> None:
    source = write_source_model(
        tmp_path / "source", pattern="ME*", dtype="F32", vocab_size=1024, moe_latent_size=32
    )
    path, out = tmp_path / "latent.gguf", tmp_path / "i.gguf"
    convert(source, ConvertOptions(out=path, recipe="f32"))
    imatrix = collect_imatrix(path, TEXT, "t", out, 64, OPTIONS, grams=True)
    (name,) = [name for name in imatrix.grams if "ffn_up_exps" in name]
    entry, gram = imatrix.entries[name], imatrix.grams[name]
    n_used = entry.counts.sum() // (imatrix.n_chunks * 64)
    # Each token's input is in the sums of all experts that it is routed to.
    np.testing.assert_allclose(n_used * np.diag(gram), entry.sums.sum(0), rtol=1e-4)


def test_gram_matrices_are_not_begun_half_way(pico_f32_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "i.gguf"
    collect_imatrix(pico_f32_gguf, TEXT, "t", out, 64, OPTIONS)
    with pytest.raises(UsageError, match="was begun without --gram"):
        collect_imatrix(pico_f32_gguf, TEXT, "t", out, 64, OPTIONS, grams=True)


def test_stopped_run_is_continued(pico_f32_gguf: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.gguf", tmp_path / "cut.gguf"
    expected = collect_imatrix(pico_f32_gguf, TEXT, "t", whole, 64, OPTIONS, grams=True)

    def stop(n_done: int, _n_total: int) -> None:
        if n_done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_here(pico_f32_gguf, Source(TEXT, 64), "t", cut, OPTIONS, stop, grams=True)
    assert read_imatrix(cut).n_chunks == 2
    seen: list[int] = []
    found = collect_imatrix(
        pico_f32_gguf, TEXT, "t", cut, 64, OPTIONS, lambda n, of: seen.append(n)
    )
    assert seen[0] == 3
    assert found.n_chunks == expected.n_chunks
    for name, entry in expected.entries.items():
        np.testing.assert_allclose(found.entries[name].sums, entry.sums, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(found.entries[name].counts, entry.counts)
    for name, gram in expected.grams.items():
        np.testing.assert_allclose(found.grams[name], gram, rtol=1e-3, atol=1e-3 * gram.max())


def test_interrupted_caller_keeps_whole_chunks(pico_f32_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "i.gguf"

    def stop(_n_done: int, _n_total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_imatrix(pico_f32_gguf, TEXT * 20, "t", out, 64, OPTIONS, stop)
    assert 1 <= read_imatrix(out).n_chunks < 100


def test_file_of_another_text_is_kept(pico_f32_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "i.gguf"
    collect_imatrix(pico_f32_gguf, TEXT, "t", out, 64, OPTIONS)
    before = out.read_bytes()
    with pytest.raises(UsageError, match="is of another text or chunk size"):
        collect_imatrix(pico_f32_gguf, TEXT + "more", "t", out, 64, OPTIONS)
    assert out.read_bytes() == before


def test_error_in_the_callback_is_no_silent_gap(
    pico_f32_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanorun.errors import EngineError
    from nanorun.runtime.measure import imatrix as module

    def broken(*_: Any) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(module._Collector, "_take", broken)
    with pytest.raises(EngineError, match="could not be read"):
        collect_here(pico_f32_gguf, Source(TEXT, 64), "t", tmp_path / "i.gguf", OPTIONS)
    assert not (tmp_path / "i.gguf").exists()
