"""The binding of ggml's quantizers."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from nanorun.errors import LibraryError
from nanorun.model.ggml_type import GgmlType
from nanorun_quant.ggml import Ggml, UnquantizableError, load_ggml
from nanorun_quant.writable_types import NEED_IMATRIX, QUANTIZERS

# Relative RMSE on N(0, 0.02), a tenth above what engine measurements gave. ggml's
# own Q2_0 loses most of it.
TOLERANCES = {
    GgmlType.F32: 0.0, GgmlType.F16: 0.0003, GgmlType.BF16: 0.002, GgmlType.Q8_0: 0.006,
    GgmlType.Q6_K: 0.0194, GgmlType.Q5_1: 0.040, GgmlType.Q5_K: 0.040, GgmlType.Q5_0: 0.047,
    GgmlType.Q4_1: 0.079, GgmlType.Q4_K: 0.079, GgmlType.Q4_0: 0.095, GgmlType.IQ4_NL: 0.084,
    GgmlType.NVFP4: 0.114, GgmlType.IQ4_XS: 0.084, GgmlType.MXFP4: 0.126, GgmlType.IQ3_S: 0.170,
    GgmlType.Q3_K: 0.162, GgmlType.IQ3_XXS: 0.208, GgmlType.Q2_K: 0.301, GgmlType.IQ2_S: 0.281,
    GgmlType.IQ2_XS: 0.340, GgmlType.Q2_0: 0.790, GgmlType.IQ2_XXS: 0.388,
}  # fmt: skip
ALIKE = np.ones(512, np.float32)


def weights_for(type_: GgmlType) -> np.ndarray | None:
    return ALIKE if type_ in NEED_IMATRIX else None


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.02, (64, 512)).astype(np.float32)


@pytest.mark.parametrize("type_", QUANTIZERS, ids=lambda type_: type_.label)
def test_round_trip_loses_no_more_than_the_type_must(type_: GgmlType, data: np.ndarray) -> None:
    ggml = load_ggml()
    data = data[:16]
    raw = ggml.quantize(data, type_, weights_for(type_))
    assert raw.shape == (16, type_.row_bytes(512))
    decoded = ggml.dequantize(raw, type_, 512)
    assert np.sqrt(np.mean((decoded - data) ** 2)) <= TOLERANCES[type_] * 0.02


def test_q8_0_equals_a_slow_reference(data: np.ndarray) -> None:
    blocks = data.reshape(-1, 32)
    scales = np.abs(blocks).max(1) / np.float32(127)
    inverse = np.where(scales, 1 / scales, 0).astype(np.float32)[:, None]
    # roundf rounds halves away from zero, numpy to even.
    scaled = blocks * inverse
    levels = (np.sign(scaled) * np.floor(np.abs(scaled) + 0.5)).astype(np.int8)
    expected = np.concatenate(
        [scales.astype("<f2")[:, None].view(np.uint8), levels.view(np.uint8)], 1
    )
    found = load_ggml().quantize(data, GgmlType.Q8_0)
    np.testing.assert_array_equal(found.reshape(-1, 34), expected)


def test_rows_quantize_alike_alone_and_together(data: np.ndarray) -> None:
    ggml = load_ggml()
    for type_ in QUANTIZERS:
        weights = weights_for(type_)
        alone = [ggml.quantize(data[i : i + 1], type_, weights) for i in range(4)]
        np.testing.assert_array_equal(
            np.concatenate(alone), ggml.quantize(data[:4], type_, weights)
        )


def test_imatrix_moves_error_to_the_columns_that_matter_less(data: np.ndarray) -> None:
    ggml = load_ggml()
    weights = np.ones(512, np.float32)
    weights[::4] = 1000

    def error(imatrix: np.ndarray | None) -> float:
        raw = ggml.quantize(data, GgmlType.Q4_K, imatrix)
        return float(np.square(ggml.dequantize(raw, GgmlType.Q4_K, 512) - data)[:, ::4].mean())

    assert error(weights) < 0.8 * error(None)


def test_threads_give_the_same_bytes(data: np.ndarray) -> None:
    ggml = load_ggml()
    expected = ggml.quantize(data, GgmlType.Q4_K)
    found: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: found.append(ggml.quantize(data, GgmlType.Q4_K)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all((raw == expected).all() for raw in found)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("type_", QUANTIZERS, ids=lambda type_: type_.label)
def test_number_that_is_not_finite_is_refused(
    type_: GgmlType, value: float, data: np.ndarray
) -> None:
    bad = data.copy()
    bad[3, 17] = value
    with pytest.raises(UnquantizableError, match=f"1 of 32768 elements .* {value} in row 3"):
        load_ggml().quantize(bad, type_, weights_for(type_))


def test_number_beyond_f16_is_refused_where_it_would_become_infinite(data: np.ndarray) -> None:
    large = data.copy()
    large[0, 0] = -70000
    with pytest.raises(UnquantizableError, match="70000 is beyond the 65504 that f16 holds"):
        load_ggml().quantize(large, GgmlType.F16)
    load_ggml().quantize(large, GgmlType.BF16)


def test_scale_beyond_f16_is_refused(data: np.ndarray) -> None:
    large = data.copy()
    large[0, 0] = 3e38
    with pytest.raises(UnquantizableError, match="scale is beyond what q4_0 holds"):
        load_ggml().quantize(large, GgmlType.Q4_0)


@pytest.mark.parametrize("type_", [t for t in QUANTIZERS if t.is_quantized])
def test_row_that_is_no_whole_blocks_is_refused_before_c_sees_it(type_: GgmlType) -> None:
    with pytest.raises(ValueError, match="do not divide a row of 100"):
        load_ggml().quantize(np.zeros((2, 100), np.float32), type_, ALIKE[:100])


@pytest.mark.parametrize("type_", [GgmlType.IQ2_XXS, GgmlType.IQ2_XS])
def test_type_that_needs_an_imatrix_is_refused_before_c_sees_it(
    type_: GgmlType, data: np.ndarray
) -> None:
    with pytest.raises(ValueError, match=f"{type_.label} cannot be made without an imatrix"):
        load_ggml().quantize(data, type_)


@pytest.mark.parametrize("type_", QUANTIZERS, ids=lambda type_: type_.label)
def test_blocks_of_zeros_stay_zeros_and_tiny_weights_do_no_harm(type_: GgmlType) -> None:
    """What padding adds, and inputs that never fire."""
    rows = np.zeros((2, 512), np.float32)
    rows[1, :256] = np.linspace(-1, 1, 256)
    weights = np.full(512, 1e-6, np.float32)
    weights[:256] = 1
    decoded = load_ggml().dequantize(load_ggml().quantize(rows, type_, weights), type_, 512)
    assert np.isfinite(decoded).all()
    assert not decoded[0].any()
    assert not decoded[1, 256:].any()
    weights = np.full(512, 1e-9, np.float32)
    assert np.isfinite(load_ggml().quantize(rows, type_, weights)).all()


def test_imatrix_of_another_length_is_refused(data: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"imatrix of shape \(500,\) for rows of 512"):
        load_ggml().quantize(data, GgmlType.Q4_K, np.ones(500, np.float32))


def test_bytes_that_are_no_whole_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="no whole rows"):
        load_ggml().dequantize(np.zeros(35, np.uint8), GgmlType.Q8_0, 32)


def test_missing_library_is_said_with_a_way_out(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path_factory.mktemp("empty")))
    load_ggml.cache_clear()
    try:
        with pytest.raises(LibraryError) as caught:
            load_ggml()
        assert "is not in" in caught.value.message
        assert "pip install" in caught.value.tries[0]
    finally:
        load_ggml.cache_clear()


def test_library_of_another_kind_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("lib") / "libggml-base.so"
    path.write_bytes(b"no library")
    with pytest.raises(LibraryError, match="cannot be used"):
        Ggml(path)
