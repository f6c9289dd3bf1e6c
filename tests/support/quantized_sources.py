"""Source models whose weights are FP8 or NVFP4, and a slow decoder of both to compare with.

Codes and scales are drawn at random, written as each tool writes them, and decoded one number at a
time by the definition of the formats, without the code under test.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.source_models import encode, write_json, write_safetensors, write_source_model

Stored = dict[str, tuple[str, tuple[int, ...], bytes]]
Quantizer = Callable[[str, np.ndarray, np.random.Generator], tuple[Stored, np.ndarray]]

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e2m1(code: int) -> float:
    return -E2M1[code & 7] if code & 8 else E2M1[code & 7]


def float8(code: int, n_mantissa: int = 3) -> float:
    code = int(code)  # numpy has numbers that wrap
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code & 0x7F) >> n_mantissa, code & (2**n_mantissa - 1)
    bias = 2 ** (6 - n_mantissa) - 1
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - n_mantissa)
    return sign * math.ldexp(2**n_mantissa + mantissa, exponent - bias - n_mantissa)


def nvfp4_modelopt(
    name: str, values: np.ndarray, rng: np.random.Generator
) -> tuple[Stored, np.ndarray]:
    stem = name.removesuffix(".weight")
    codes, scales, decoded = _nvfp4(values, rng)
    factor = np.float32(rng.uniform(1e-5, 1e-3))
    stored: Stored = {
        name: ("U8", codes.shape, codes.tobytes()),
        f"{stem}.weight_scale": ("F8_E4M3", scales.shape, scales.tobytes()),
        f"{stem}.weight_scale_2": ("F32", (), factor.tobytes()),
        f"{stem}.input_scale": ("F32", (), np.float32(0.01).tobytes()),
    }
    return stored, (decoded * float(factor)).astype(np.float32)


def nvfp4_compressed(
    name: str, values: np.ndarray, rng: np.random.Generator
) -> tuple[Stored, np.ndarray]:
    stem = name.removesuffix(".weight")
    codes, scales, decoded = _nvfp4(values, rng)
    divisor = np.float32(rng.uniform(1e3, 1e5))
    stored: Stored = {
        f"{name}_packed": ("U8", codes.shape, codes.tobytes()),
        f"{stem}.weight_scale": ("F8_E4M3", scales.shape, scales.tobytes()),
        f"{stem}.weight_global_scale": ("F32", (1,), divisor.tobytes()),
        f"{stem}.input_global_scale": ("F32", (1,), np.float32(100.0).tobytes()),
    }
    return stored, (decoded / float(divisor)).astype(np.float32)


def _nvfp4(
    values: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales, and their exact products in float64."""
    n_rows, n_columns = values.shape
    codes = rng.integers(0, 256, (n_rows, n_columns // 2)).astype(np.uint8)
    scales = rng.integers(0, 0x7F, (n_rows, n_columns // 16)).astype(np.uint8)
    decoded = np.empty((n_rows, n_columns))
    for row in range(n_rows):
        for column in range(n_columns):
            byte = int(codes[row, column // 2])
            code = byte >> 4 if column % 2 else byte & 15
            decoded[row, column] = e2m1(code) * float8(int(scales[row, column // 16]))
    return codes, scales, decoded


def fp8(scale_shape: Callable[[tuple[int, ...]], tuple[int, ...]], dtype: str = "F32") -> Quantizer:
    """FP8 with scales of the shape that `scale_shape` gives for the weight's."""

    def quantize(
        name: str, values: np.ndarray, rng: np.random.Generator
    ) -> tuple[Stored, np.ndarray]:
        codes = rng.integers(0, 0x7F, values.shape).astype(np.uint8)
        codes |= rng.integers(0, 2, values.shape).astype(np.uint8) << 7
        shape = scale_shape(values.shape)
        raw = encode(rng.uniform(1e-5, 1e-4, shape).astype(np.float32), dtype)
        scales = np.frombuffer(raw, "<f4" if dtype == "F32" else "<u2")
        if dtype == "BF16":
            scales = (scales.astype(np.uint32) << 16).view(np.float32)
        stored: Stored = {
            name: ("F8_E4M3", values.shape, codes.tobytes()),
            f"{name}_scale": (dtype, shape, raw),
            f"{name.removesuffix('.weight')}.input_scale": ("F32", (), bytes(4)),
        }
        exact = np.vectorize(float8)(codes) * _spread(scales.reshape(shape), values.shape)
        return stored, exact.astype(np.float32)

    return quantize


def _spread(scales: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Each element's scale, in float64."""
    wide = scales.astype(np.float64)
    if wide.size == 1:
        return np.full(shape, wide.reshape(()))
    if wide.shape in ((shape[0],), (shape[0], 1)):
        return np.repeat(wide.reshape(-1, 1), shape[1], 1)
    return wide.repeat(128, 0).repeat(128, 1)[: shape[0], : shape[1]]


FP8_MODELOPT = fp8(lambda shape: ())
FP8_CHANNEL = fp8(lambda shape: (shape[0], 1), "BF16")
FP8_BLOCK = fp8(lambda shape: (-(-shape[0] // 128), -(-shape[1] // 128)))


def write_quantized_model(
    folder: Path,
    quantizer_of: Callable[[str], Quantizer | None],
    *,
    scheme: Mapping[str, Any] | None = None,
    seed: int = 5,
    edit: Callable[[Stored], None] | None = None,
    **arguments: Any,
) -> tuple[Path, dict[str, np.ndarray]]:
    """Write a source model with some weights quantized; return what each weight decodes to.

    Args:
        folder: Where.
        quantizer_of: Of a weight's name, or None to leave it as it is.
        scheme: config.json's `quantization_config`.
        seed: Of codes and scales.
        edit: Called with what is to be stored.
        **arguments: Of `write_source_model`.
    """
    written: dict[str, np.ndarray] = {}
    write_source_model(folder, edit=written.update, **arguments)
    rng = np.random.default_rng(seed)
    stored: Stored = {}
    decoded: dict[str, np.ndarray] = {}
    for name, values in written.items():
        quantize = quantizer_of(name)
        if quantize is None:
            raw = encode(values, "F32")
            stored[name], decoded[name] = ("F32", values.shape, raw), values
        else:
            entries, decoded[name] = quantize(name, values, rng)
            stored |= entries
    if edit is not None:
        edit(stored)
    write_safetensors(folder / "model.safetensors", stored)
    if scheme is not None:
        config = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", config | {"quantization_config": dict(scheme)})
    return folder, decoded
