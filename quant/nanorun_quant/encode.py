"""Numbers into the bytes of a type, by the encoder that was chosen for it."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from nanorun.errors import LibraryError, UsageError
from nanorun.model.ggml_type import GgmlType
from nanorun_quant.codecs import q2_0
from nanorun_quant.feedback import Feedback
from nanorun_quant.ggml import F16_MAX, Ggml, UnquantizableError, check_range, load_ggml

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nanorun_quant.torch_quantizer import TorchQuantizer

QUANTIZER_NAMES = ("auto", "ggml", "torch")
TORCH_TYPES = frozenset(
    (
        GgmlType.Q3_K, GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K, GgmlType.IQ4_NL,
        GgmlType.IQ4_XS,
    )
)  # fmt: skip
"""Types that are slow to encode with ggml and that torch can encode too."""
# Of all of them Q6_K reaches furthest: a float16, times a scale, times a level.
_TORCH_MAX = F16_MAX * 128 * 32


class Encoder:
    """Encodes rows; every method may be called from several threads.

    Args:
        ggml: The library, whose bytes those of most types are.
        on_torch: Encodes `TORCH_TYPES` instead, if given.
    """

    def __init__(self, ggml: Ggml, on_torch: TorchQuantizer | None = None) -> None:
        self._ggml = ggml
        self._torch = on_torch

    def encode(
        self,
        data: NDArray[np.float32],
        type_: GgmlType,
        weights: NDArray[np.float32] | None = None,
        feedback: Feedback | None = None,
    ) -> NDArray[np.uint8]:
        """Encode rows as `type_`.

        Q2_0 is always encoded by `codecs.q2_0`, all else by ggml unless torch is there for it.

        Args:
            data: `(n_rows, n_per_row)`.
            type_: The type.
            weights: Weight of each column's squared error, `(n_per_row,)`.
            feedback: How columns make up for each other's errors.

        Returns:
            The bytes, `(n_rows, row_bytes)`.

        Raises:
            UnquantizableError: If the type cannot hold a number.
        """
        if feedback is None or not type_.is_quantized:
            return self._encode(data, type_, weights)

        def encode_block(
            numbers: NDArray[np.float32], columns: slice
        ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
            raw = self._encode(numbers, type_, None if weights is None else weights[columns])
            return raw, self._ggml.dequantize(raw, type_, numbers.shape[1])

        return feedback.encode(data, type_.block_size, encode_block)

    def _encode(
        self, data: NDArray[np.float32], type_: GgmlType, weights: NDArray[np.float32] | None
    ) -> NDArray[np.uint8]:
        if type_ is GgmlType.Q2_0:
            check_range(data, type_)
            return q2_0.encode(data, weights)
        if self._torch is None or type_ not in TORCH_TYPES:
            return self._ggml.quantize(data, type_, weights)
        check_range(data, type_)
        if np.abs(data).max(initial=0.0) > _TORCH_MAX:
            raise UnquantizableError(f"a block's scale is beyond what {type_.label} holds")
        raw = self._torch.quantize(np.ascontiguousarray(data, np.float32), type_, weights)
        self._ggml.check_blocks(raw, type_)
        return raw

    def noise(
        self,
        data: NDArray[np.float32],
        type_: GgmlType,
        weights: NDArray[np.float32],
        feedback: Feedback | None = None,
    ) -> NDArray[np.float64]:
        """Mean square of what encoding as `type_` adds to each row's output, `(n_rows,)`."""
        raw = self.encode(data, type_, weights, feedback)
        return powers(self._ggml.dequantize(raw, type_, data.shape[1]) - data, weights, feedback)


def powers(
    rows: NDArray[np.float32], weights: NDArray[np.float32], feedback: Feedback | None = None
) -> NDArray[np.float64]:
    """Mean square of each row's output, `(n_rows,)`.

    Without `feedback` as if inputs, of mean squares `weights`, did not go together.
    """
    if feedback is not None:
        return feedback.powers(rows)
    found: NDArray[np.float64] = np.square(rows, dtype=np.float64) @ weights
    return found


@dataclass(frozen=True, slots=True)
class Quantizer:
    """Whose code makes the bytes."""

    device: str | None = None
    """Torch's device; None for ggml alone."""

    @property
    def label(self) -> str:
        """What the file says of it: `ggml`, or `torch 2.13.0 on cuda`."""
        if self.device is None:
            return "ggml"
        from importlib.metadata import version

        return f"torch {version('torch')} on {self.device}"

    def open(self) -> Encoder:
        """The encoder, ready for work."""
        if self.device is None:
            return Encoder(load_ggml())
        from nanorun_quant.torch_quantizer import TorchQuantizer

        return Encoder(load_ggml(), TorchQuantizer(self.device))


def choose_quantizer(name: str, types: Iterable[GgmlType]) -> Quantizer:
    """The quantizer called `name`, for a file of these types.

    `auto` is torch where there is a GPU for it and a type that it can encode, else ggml.

    Raises:
        UsageError: If there is no such quantizer.
        LibraryError: If torch is wanted and not installed.
    """
    if name not in QUANTIZER_NAMES:
        raise UsageError(
            f"there is no quantizer {name!r}", facts=[f"quantizers: {' '.join(QUANTIZER_NAMES)}"]
        )
    if name == "torch" and importlib.util.find_spec("torch") is None:
        raise LibraryError("torch is not installed", tries=["pip install 'nanorun[convert]'"])
    if name == "ggml" or TORCH_TYPES.isdisjoint(types):
        return Quantizer()
    if _has_cuda():
        return Quantizer("cuda")
    return Quantizer("cpu" if name == "torch" else None)


@cache
def _has_cuda() -> bool:
    """Whether torch has a GPU to work on. Torch is only imported where a driver is installed."""
    if importlib.util.find_spec("torch") is None:
        return False
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    import torch

    return torch.cuda.is_available()
