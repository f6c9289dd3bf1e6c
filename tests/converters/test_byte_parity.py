"""Each quantized tensor holds the bytes that llama.cpp's own tool makes of the F32 file."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import read_gguf
from nanorun_converters.convert import ConvertOptions, convert
from nanorun_quant.imatrix import Entry, Imatrix
from nanorun_quant.imatrix_file import write_imatrix
from nanorun_quant.writable_types import NEED_IMATRIX, QUANTIZERS, USE_NO_IMATRIX
from tests.support.source_models import write_source_model

# enum llama_ftype whose default tensor type is the one wanted.
FILE_TYPES = {
    GgmlType.F16: 1,
    GgmlType.Q4_0: 2,
    GgmlType.Q4_1: 3,
    GgmlType.Q8_0: 7,
    GgmlType.Q5_0: 8,
    GgmlType.Q5_1: 9,
    GgmlType.Q2_K: 10,
    GgmlType.Q3_K: 12,
    GgmlType.Q4_K: 14,
    GgmlType.Q5_K: 16,
    GgmlType.Q6_K: 18,
    GgmlType.IQ2_XXS: 19,
    GgmlType.IQ2_XS: 20,
    GgmlType.IQ3_XXS: 23,
    GgmlType.IQ4_NL: 25,
    GgmlType.IQ3_S: 26,
    GgmlType.IQ2_S: 29,
    GgmlType.IQ4_XS: 30,
    GgmlType.BF16: 32,
    GgmlType.MXFP4: 38,
}
WITHOUT_FILE_TYPE = {GgmlType.F32, GgmlType.NVFP4, GgmlType.Q2_0}
"""F32 is what llama.cpp's tool reads; it refuses NVFP4; Q2_0 has an encoder of nanorun's own."""


@pytest.fixture(scope="module")
def source_of_256(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source model whose every row is a multiple of 256, so that K-quants fit."""
    return write_source_model(
        tmp_path_factory.mktemp("source"), pattern="ME*", dtype="F32", hidden_size=256,
        num_attention_heads=8, mamba_num_heads=8, moe_intermediate_size=256, n_routed_experts=3,
        moe_shared_expert_intermediate_size=512,
    )  # fmt: skip


@pytest.fixture(scope="module")
def f32_file(source_of_256: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("f32") / "model.gguf"
    convert(source_of_256, ConvertOptions(out=out, recipe="f32"))
    return out


@pytest.fixture(scope="module")
def imatrix(f32_file: Path) -> Imatrix:
    """Weights for every matrix of the file, experts apart, as if one input had been seen."""
    rng = np.random.default_rng(0)
    entries = {}
    for tensor in read_gguf(f32_file).tensors.values():
        if len(tensor.shape) > 1:
            n_mat = tensor.shape[0] if len(tensor.shape) > 2 else 1
            sums = rng.uniform(0.1, 3, (n_mat, tensor.shape[-1])).astype(np.float32)
            entries[tensor.name] = Entry(sums, np.ones(n_mat, np.int64))
    return Imatrix(entries)


def quantize_with_llama(
    source: Path, out: Path, type_: GgmlType, imatrix: Imatrix | None = None
) -> None:
    from nanorun.runtime.llama.binding import load_llama

    llama = load_llama()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.pure, params.nthread = FILE_TYPES[type_], True, 2
    if imatrix is not None:
        # The list ends with a row without a name.
        entries = (llama.llama_model_imatrix_data * (len(imatrix.entries) + 1))()
        for row, (name, entry) in zip(entries, imatrix.entries.items(), strict=False):
            row.name, row.size = name.encode(), entry.sums.size
            row.data = entry.sums.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    status = llama.llama_model_quantize(
        str(source).encode(), str(out).encode(), ctypes.byref(params)
    )
    assert status == 0


def tensor_bytes(path: Path) -> dict[str, tuple[GgmlType, bytes]]:
    raw = path.read_bytes()
    tensors = read_gguf(path).tensors.values()
    return {t.name: (t.type, raw[t.offset : t.offset + t.n_bytes]) for t in tensors}


def test_every_quantizer_is_compared() -> None:
    assert set(FILE_TYPES) == set(QUANTIZERS) - WITHOUT_FILE_TYPE


@pytest.mark.parametrize(
    "type_", [t for t in FILE_TYPES if t not in NEED_IMATRIX], ids=lambda type_: type_.label
)
def test_bytes_equal_those_of_llama_quantize(
    type_: GgmlType, source_of_256: Path, f32_file: Path, tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    convert(
        source_of_256, ConvertOptions(out=ours, recipe=type_.label, quantizer="ggml", n_threads=3)
    )
    quantize_with_llama(f32_file, theirs, type_)
    expected, found = tensor_bytes(theirs), tensor_bytes(ours)
    assert {name: t for name, (t, _) in found.items()} == {
        name: t for name, (t, _) in expected.items()
    }
    different = [name for name in expected if found[name][1] != expected[name][1]]
    assert not different
    assert sum(t is type_ for t, _ in found.values()) == 12


@pytest.mark.parametrize(
    "type_", [t for t in FILE_TYPES if t not in USE_NO_IMATRIX], ids=lambda type_: type_.label
)
def test_bytes_under_an_imatrix_equal_those_of_llama_quantize(
    type_: GgmlType, source_of_256: Path, f32_file: Path, imatrix: Imatrix, tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    write_imatrix(tmp_path / "imatrix.gguf", imatrix)
    options = ConvertOptions(
        out=ours, recipe=type_.label, quantizer="ggml", imatrix=tmp_path / "imatrix.gguf"
    )
    convert(source_of_256, options)
    quantize_with_llama(f32_file, theirs, type_, imatrix)
    expected, found = tensor_bytes(theirs), tensor_bytes(ours)
    assert [name for name in expected if found[name] != expected[name]] == []
