"""The Q2_0 encoder: as good as can be, and in ggml's own bits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nanorun.model.ggml_type import GgmlType
from nanorun_quant.codecs import q2_0
from nanorun_quant.encode import Encoder
from nanorun_quant.ggml import UnquantizableError, load_ggml


def decoded(data: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    raw = q2_0.encode(data, weights)
    assert raw.shape == (len(data), GgmlType.Q2_0.row_bytes(data.shape[1]))
    return load_ggml().dequantize(raw, GgmlType.Q2_0, data.shape[1])


def relative_rmse(data: np.ndarray, found: np.ndarray) -> float:
    return float(np.sqrt(np.square(found - data).mean() / np.square(data).mean()))


def test_error_on_gaussian_weights_is_half_of_ggmls() -> None:
    data = np.random.default_rng(0).normal(0, 0.02, (64, 512)).astype(np.float32)
    ggml = load_ggml()
    theirs = ggml.dequantize(ggml.quantize(data, GgmlType.Q2_0), GgmlType.Q2_0, 512)
    assert relative_rmse(data, theirs) > 0.70
    assert relative_rmse(data, decoded(data)) < 0.355


def test_scale_is_the_best_there_is() -> None:
    """Against every scale of a fine grid, of both signs, and the levels nearest to it."""
    rng = np.random.default_rng(1)
    data = rng.standard_t(4, (8, 64)).astype(np.float32)
    weights = rng.uniform(0.1, 4, 64).astype(np.float32)
    found = (np.square(decoded(data, weights) - data) @ weights).astype(np.float64)
    for row, error in zip(data, found, strict=True):
        scales = np.concatenate([np.linspace(0.01, 4, 3000), -np.linspace(0.01, 4, 3000)])
        levels = np.clip(np.rint(row / scales[:, None]), -1, 2)
        errors = np.square(levels * scales[:, None] - row) @ weights
        # float16 rounds the scale.
        assert error <= errors.min() * 1.001


def test_what_the_type_can_hold_comes_back_exactly() -> None:
    levels = np.array(list(itertools.product([-1, 0, 1, 2], repeat=3)), np.float32).reshape(-1, 64)
    for scale in (0.5, -0.25):
        np.testing.assert_array_equal(decoded(levels * np.float32(scale)), levels * scale)


def test_weights_move_the_error_to_columns_that_matter_less() -> None:
    data = np.random.default_rng(2).normal(size=(32, 256)).astype(np.float32)
    weights = np.ones(256, np.float32)
    weights[::4] = 100

    def error(found: np.ndarray) -> float:
        return float(np.square(found - data)[:, ::4].mean())

    assert error(decoded(data, weights)) < 0.8 * error(decoded(data))


def test_zeros_stay_zeros() -> None:
    assert not decoded(np.zeros((2, 128), np.float32)).any()


def test_long_rows_encode_alike_alone_and_together() -> None:
    data = np.random.default_rng(3).normal(size=(600, 256)).astype(np.float32)
    weights = np.random.default_rng(4).uniform(0.5, 2, 256).astype(np.float32)
    together = q2_0.encode(data, weights)
    np.testing.assert_array_equal(together[520:], q2_0.encode(data[520:], weights))


def test_number_that_cannot_be_held_is_refused() -> None:
    data = np.zeros((1, 64), np.float32)
    data[0, 3] = 3e38
    with pytest.raises(UnquantizableError, match="scale is beyond what q2_0 holds"):
        q2_0.encode(data)
    data[0, 3] = np.nan
    with pytest.raises(UnquantizableError, match="not finite"):
        Encoder(load_ggml()).encode(data, GgmlType.Q2_0)
