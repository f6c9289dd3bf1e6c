"""Encoders on torch: valid in ggml's eyes, and never worse than ggml's own."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nanorun.errors import LibraryError, UsageError
from nanorun.model.ggml_type import GgmlType
from nanorun_quant import encode as encode_module
from nanorun_quant.codecs.torch_pack import ENCODERS
from nanorun_quant.encode import TORCH_TYPES, Encoder, Quantizer, choose_quantizer
from nanorun_quant.ggml import UnquantizableError, load_ggml
from nanorun_quant.torch_quantizer import TorchQuantizer
from tests.conftest import PICO_SOURCE

TYPES = sorted(ENCODERS)
N_PER_ROW = 512


@cache
def pico_weights() -> np.ndarray:
    tensors = load_file(PICO_SOURCE / "model.safetensors")
    flat = [t.float().flatten().numpy() for name, t in tensors.items() if "mixer" in name]
    return np.concatenate(flat)[: 256 * N_PER_ROW].reshape(256, N_PER_ROW)


def numbers(kind: str) -> np.ndarray:
    rng = np.random.default_rng(5)
    if kind == "pico":
        return pico_weights()
    draw = rng.normal if kind == "gaussian" else lambda *a: rng.standard_t(4, a[-1]) * a[1]
    return np.asarray(draw(0, 0.02, (64, N_PER_ROW)), np.float32)


def column_weights(kind: str) -> np.ndarray | None:
    if kind == "none":
        return None
    return np.exp(np.random.default_rng(6).normal(0, 1.5, N_PER_ROW)).astype(np.float32)


def weighted_error(data: np.ndarray, raw: np.ndarray, type_: GgmlType, w: np.ndarray) -> float:
    difference = load_ggml().dequantize(raw, type_, data.shape[1]).astype(np.float64) - data
    return float((np.square(difference) @ w).sum())


@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "pico"])
@pytest.mark.parametrize("imatrix", ["none", "imatrix"])
@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.label)
def test_error_is_no_higher_than_ggmls(type_: GgmlType, imatrix: str, kind: str) -> None:
    data, weights = numbers(kind), column_weights(imatrix)
    w = np.ones(N_PER_ROW) if weights is None else weights.astype(np.float64)
    mine = TorchQuantizer("cpu").quantize(data, type_, weights)
    theirs = load_ggml().quantize(data, type_, weights)
    # Noise power; from 2 % (Q3_K, Q4_K) to 14 % (Q5_K) less.
    assert weighted_error(data, mine, type_, w) < 0.985 * weighted_error(data, theirs, type_, w)


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.label)
def test_numbers_are_those_that_ggml_decodes(type_: GgmlType) -> None:
    data = numbers("pico")
    x = torch.from_numpy(data).reshape(-1, type_.block_size)
    raw, values = ENCODERS[type_](x, torch.ones_like(x))
    decoded = load_ggml().dequantize(raw.numpy(), type_, N_PER_ROW)
    # A machine with fused multiply-add rounds once less.
    np.testing.assert_allclose(decoded, values.reshape(data.shape).numpy(), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-7, 1e-4, 1.0, 3e3])
@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.label)
def test_numbers_of_any_size_are_kept(type_: GgmlType, scale: float) -> None:
    data = (numbers("gaussian") / 0.02 * scale).astype(np.float32)
    raw = Encoder(load_ggml(), TorchQuantizer("cpu")).encode(data, type_)
    ones = np.ones(N_PER_ROW)
    theirs = load_ggml().quantize(data, type_)
    assert weighted_error(data, raw, type_, ones) <= weighted_error(data, theirs, type_, ones)


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.label)
def test_zeros_stay_and_lone_numbers_are_kept(type_: GgmlType) -> None:
    data = np.zeros((4, N_PER_ROW), np.float32)
    data[1], data[2, :256], data[3, 5] = 0.5, -0.25, 1.0
    raw = TorchQuantizer("cpu").quantize(data, type_)
    assert not load_ggml().dequantize(raw, type_, N_PER_ROW)[0].any()
    theirs, ones = load_ggml().quantize(data, type_), np.ones(N_PER_ROW)
    for row in (1, 2, 3):
        mine_, theirs_ = (
            weighted_error(data[row : row + 1], found[row : row + 1], type_, ones)
            for found in (raw, theirs)
        )
        # Beyond what a scale's rounding to float16 costs.
        assert mine_ <= theirs_ + 2.0**-22 * float(np.square(data[row]).sum())


def test_rows_encode_alike_alone_and_in_batches_of_bounded_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, weights = numbers("gaussian").repeat(3, axis=0), column_weights("imatrix")
    sizes: list[int] = []
    encode = ENCODERS[GgmlType.Q4_K]

    def watched(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(x.numel())
        return encode(x, w)

    monkeypatch.setitem(ENCODERS, GgmlType.Q4_K, watched)
    quantizer = TorchQuantizer("cpu")
    quantizer._n_batch = 2**13
    together = quantizer.quantize(data, GgmlType.Q4_K, weights)
    assert max(sizes) == 2**13
    assert sum(sizes) == data.size
    for first in (0, 37):
        alone = TorchQuantizer("cpu").quantize(data[first : first + 1], GgmlType.Q4_K, weights)
        np.testing.assert_array_equal(together[first], alone[0])


def test_weights_move_the_error_to_columns_that_matter_less() -> None:
    data = numbers("gaussian")
    weights = np.ones(N_PER_ROW, np.float32)
    weights[::4] = 100

    def error(w: np.ndarray | None) -> float:
        raw = TorchQuantizer("cpu").quantize(data, GgmlType.IQ4_NL, w)
        found = load_ggml().dequantize(raw, GgmlType.IQ4_NL, N_PER_ROW)
        return float(np.square(found - data)[:, ::4].mean())

    assert error(weights) < 0.8 * error(None)


def test_number_that_cannot_be_held_is_refused() -> None:
    encoder = Encoder(load_ggml(), TorchQuantizer("cpu"))
    data = np.zeros((1, 256), np.float32)
    for number in (3e38, -1e10, 2e8):
        data[0, 3] = number
        for type_ in TYPES:
            if number != 2e8 or type_ not in (GgmlType.Q6_K, GgmlType.IQ4_XS):
                with pytest.raises(UnquantizableError, match=f"what {type_.label} holds"):
                    encoder.encode(data, type_)
    data[0, 3] = np.nan
    with pytest.raises(UnquantizableError, match="not finite"):
        encoder.encode(data, GgmlType.Q6_K)


def test_types_that_torch_cannot_encode_are_ggmls() -> None:
    data = numbers("gaussian")
    encoder = Encoder(load_ggml(), TorchQuantizer("cpu"))
    for type_ in (GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.MXFP4):
        np.testing.assert_array_equal(
            encoder.encode(data, type_), load_ggml().quantize(data, type_)
        )
    assert encoder.encode(data, GgmlType.Q4_K).tobytes() != (
        load_ggml().quantize(data, GgmlType.Q4_K).tobytes()
    )


# -- which one is taken --------------------------------------------------------------------------


def test_types_are_those_that_there_are_encoders_for() -> None:
    assert frozenset(ENCODERS) == TORCH_TYPES


@pytest.mark.parametrize(
    ("name", "has_cuda", "types", "device"),
    [
        ("auto", True, [GgmlType.Q4_K, GgmlType.F32], "cuda"),
        ("auto", True, [GgmlType.Q8_0, GgmlType.F32], None),
        ("auto", False, [GgmlType.Q4_K], None),
        ("torch", True, [GgmlType.Q4_K], "cuda"),
        ("torch", False, [GgmlType.Q4_K], "cpu"),
        ("torch", False, [GgmlType.Q8_0], None),
        ("ggml", True, [GgmlType.Q4_K], None),
    ],
)
def test_torch_is_taken_where_it_pays_or_is_asked_for(
    name: str,
    has_cuda: bool,
    types: list[GgmlType],
    device: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encode_module, "_has_cuda", lambda: has_cuda)
    assert choose_quantizer(name, types) == Quantizer(device)


def test_label_names_torch_and_its_device() -> None:
    assert Quantizer().label == "ggml"
    assert Quantizer("cpu").label == f"torch {torch.__version__} on cpu"


def test_unknown_quantizer_and_missing_torch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="there is no quantizer 'llama'"):
        choose_quantizer("llama", [])
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(LibraryError, match="torch is not installed"):
        choose_quantizer("torch", [GgmlType.Q4_K])
    assert choose_quantizer("ggml", [GgmlType.Q4_K]) == Quantizer()


@pytest.mark.gpu
@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.label)
def test_gpu_is_as_good_as_the_processor(type_: GgmlType) -> None:
    data, weights = numbers("pico"), column_weights("imatrix")
    assert weights is not None
    errors = [
        weighted_error(data, TorchQuantizer(device).quantize(data, type_, weights), type_, weights)
        for device in ("cpu", "cuda")
    ]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
