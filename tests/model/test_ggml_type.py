from __future__ import annotations

import ctypes

import gguf
import pytest

from nanorun.errors import UsageError
from nanorun.model.ggml_type import GgmlType

KNOWN_TO_GGUF_PY = [t for t in GgmlType if t.name in gguf.GGMLQuantizationType.__members__]


@pytest.mark.parametrize("type_", KNOWN_TO_GGUF_PY)
def test_ids_and_sizes_are_those_of_gguf_py(type_: GgmlType) -> None:
    known = gguf.GGMLQuantizationType[type_.name]
    block_size, type_size = gguf.GGML_QUANT_SIZES[known]
    if type_ is GgmlType.Q8_1:
        type_size = 36  # gguf-py counts two float32; block_q8_1 in ggml-common.h has two halves
    assert (type_.value, type_.block_size, type_.type_size) == (known, block_size, type_size)


def test_every_type_of_gguf_py_is_known() -> None:
    assert {t.name for t in gguf.GGMLQuantizationType} <= set(GgmlType.__members__)


@pytest.mark.parametrize("type_", list(GgmlType))
def test_sizes_are_those_of_the_engines_library(type_: GgmlType) -> None:
    from llama_cpp.llama_cpp import _lib

    _lib.ggml_blck_size.restype = ctypes.c_int64
    _lib.ggml_type_size.restype = ctypes.c_size_t
    assert _lib.ggml_blck_size(type_.value) == type_.block_size
    assert _lib.ggml_type_size(type_.value) == type_.type_size


@pytest.mark.parametrize(
    ("type_", "bpw"),
    [
        (GgmlType.BF16, 16),
        (GgmlType.Q8_0, 8.5),
        (GgmlType.Q6_K, 6.5625),
        (GgmlType.Q4_K, 4.5),
        (GgmlType.MXFP4, 4.25),
        (GgmlType.NVFP4, 4.5),
        (GgmlType.Q2_0, 2.25),
        (GgmlType.Q1_0, 1.125),
        (GgmlType.IQ2_XXS, 2.0625),
    ],
)
def test_bpw_is_that_of_the_format(type_: GgmlType, bpw: float) -> None:
    assert type_.bpw == bpw


def test_row_bytes_counts_whole_blocks() -> None:
    assert GgmlType.Q8_0.row_bytes(2688) == 84 * 34
    with pytest.raises(ValueError, match="blocks of 256, which do not divide a row of 2688"):
        GgmlType.Q4_K.row_bytes(2688)


def test_from_name_ignores_case_and_offers_the_nearest() -> None:
    assert GgmlType.from_name("Q4_k") is GgmlType.Q4_K
    assert GgmlType.from_name("iq4_nl").label == "iq4_nl"
    with pytest.raises(UsageError, match="'q4_kk'") as caught:
        GgmlType.from_name("q4_kk")
    assert "q4_k" in caught.value.render()
    with pytest.raises(UsageError) as caught:
        GgmlType.from_name("?")
    assert "mxfp4" in caught.value.render()
