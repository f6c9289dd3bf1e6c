"""Weights that a source model holds already quantized: FP8 and NVFP4, each with its scales.

Both are a code of few bits times one or two scales. Decoding multiplies in float32 and rounds once,
at the end, so it gives the number that is meant to the last bit. NVFP4 can also be moved into
ggml's blocks without decoding: 64 elements are 4 scale bytes and 32 bytes of codes there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from nanorun_converters.source.files import Store
from nanorun_converters.source.source_model import SourceTensor
from nanorun_quant.ggml import UnquantizableError

if TYPE_CHECKING:
    from numpy.typing import NDArray

NVFP4_GROUP = 16
"""Elements that share a scale."""
NVFP4_BLOCK_BYTES = 36
"""ggml's `block_nvfp4` of 64 elements: the scales of four groups, then their codes."""
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")


class Part(Protocol):
    """One tensor of a source model, whatever its encoding."""

    @property
    def name(self) -> str:
        """As the source model has it."""

    @property
    def store(self) -> Store:
        """The file that holds it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers, not of their codes."""

    @property
    def n_elements(self) -> int:
        """Numbers the tensor holds."""

    def read(self, first: int, end: int) -> NDArray[np.float32]:
        """Elements `first` to `end`, which are whole rows: shape `(end - first,)`."""


@dataclass(frozen=True, slots=True)
class Fp8Tensor:
    """A matrix of 8-bit floats and scales, each for `block` rows and columns."""

    weight: SourceTensor
    scale: SourceTensor
    block: tuple[int, int]

    @property
    def name(self) -> str:
        """As the source model has it."""
        return self.weight.name

    @property
    def store(self) -> Store:
        """The file that holds the codes."""
        return self.weight.store

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return self.weight.shape

    @property
    def n_elements(self) -> int:
        """Numbers the tensor holds."""
        return self.weight.n_elements

    def read(self, first: int, end: int) -> NDArray[np.float32]:
        """Elements `first` to `end`, which are whole rows: shape `(end - first,)`."""
        n_columns = self.shape[-1]
        codes = self.weight.read_bytes(first, end)
        values = FP8_VALUES[self.weight.dtype][codes].reshape(-1, n_columns)
        # What overflows becomes infinite, and the quantizer refuses that by name.
        with np.errstate(over="ignore", invalid="ignore"):
            values *= self._scales(first // n_columns, len(values))
        return values.reshape(-1)

    def _scales(self, i_row: int, n_rows: int) -> NDArray[np.float32]:
        """The scales of some rows, in a shape that broadcasts over them."""
        per_row, per_column = self.block
        n_scales = -(-self.shape[-1] // per_column)
        first = i_row // per_row
        end = (i_row + n_rows - 1) // per_row + 1
        scales = self.scale.read(first * n_scales, end * n_scales).reshape(-1, n_scales)
        if n_scales > 1:
            scales = np.repeat(scales, per_column, axis=1)[:, : self.shape[-1]]
        i_scale = np.arange(i_row, i_row + n_rows) // per_row - first
        return np.take(scales, i_scale, axis=0)


@dataclass(frozen=True, slots=True)
class Nvfp4Tensor:
    """A matrix of 4-bit floats, two a byte, an E4M3 scale for 16 of them, and a factor for all."""

    codes: SourceTensor
    """`(rows, columns / 2)`; element 2i is the low half of byte i."""
    scales: SourceTensor
    """`(rows, columns / 16)`."""
    factor: SourceTensor
    is_divisor: bool
    """Whether `factor` divides, as compressed-tensors has it, or multiplies."""
    input_scale: SourceTensor | None = None
    """Calibration of the activations, where there is one."""

    @property
    def name(self) -> str:
        """As the source model has it."""
        return self.codes.name

    @property
    def store(self) -> Store:
        """The file that holds the codes."""
        return self.codes.store

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 2)

    @property
    def n_elements(self) -> int:
        """Numbers the tensor holds."""
        return math.prod(self.shape)

    def read(self, first: int, end: int) -> NDArray[np.float32]:
        """Elements `first` to `end`, which are whole rows: shape `(end - first,)`."""
        # E2M1 times E4M3 has 6 significant bits: exact in float32 whatever the exponents.
        scales = FP8_VALUES["F8_E4M3"][self._scale_bytes(first, end)]
        values = _PAIR_VALUES[self.codes.read_bytes(first // 2, end // 2)]
        values = values.reshape(-1, NVFP4_GROUP)
        values *= scales[:, None]
        factor = self.factor.read(0, 1)[0]
        with np.errstate(all="ignore"):
            if self.is_divisor:
                values /= factor
            else:
                values *= factor
        return values.reshape(-1)

    def read_blocks(self, first: int, end: int) -> NDArray[np.uint8]:
        """Elements `first` to `end`, which are whole rows, as ggml's blocks; no bit is lost.

        Returns:
            The bytes of each row, without the factor: shape `(rows, row_bytes)`.

        Raises:
            UnquantizableError: If a scale is negative or not a number, which ggml cannot hold.
        """
        scales = self._scale_bytes(first, end)
        # ggml reads a scale without its sign, and NaN as 0.
        bad = (scales > 0x80) | (scales == 0x7F)
        if bad.any():
            raise UnquantizableError(
                f"{int(bad.sum())} of {bad.size} block scales are negative or not a number"
            )
        blocks = np.empty((scales.size // 4, NVFP4_BLOCK_BYTES), np.uint8)
        blocks[:, :4] = scales.reshape(-1, 4) & 0x7F
        # A source byte holds elements 2i and 2i+1 of a group; ggml's byte j holds j and j+8.
        codes = self.codes.read_bytes(first // 2, end // 2).reshape(-1, 8)
        even, odd = codes & 0x0F, codes >> 4
        moved = np.empty_like(codes)
        moved[:, 0::2] = even[:, :4] | (even[:, 4:] << 4)
        moved[:, 1::2] = odd[:, :4] | (odd[:, 4:] << 4)
        blocks[:, 4:] = moved.reshape(-1, 32)
        n_columns = self.shape[-1]
        return blocks.reshape((end - first) // n_columns, -1)

    def _scale_bytes(self, first: int, end: int) -> NDArray[np.uint8]:
        return self.scales.read_bytes(first // NVFP4_GROUP, end // NVFP4_GROUP)


@dataclass(frozen=True, slots=True)
class Nvfp4Factors:
    """The factors of NVFP4 matrices (the experts of a layer, or a single one), as a vector."""

    tensors: tuple[SourceTensor, ...]
    is_divisor: bool

    @property
    def name(self) -> str:
        """As the source model has the first."""
        return self.tensors[0].name

    @property
    def store(self) -> Store:
        """The file that holds the first."""
        return self.tensors[0].store

    @property
    def shape(self) -> tuple[int, ...]:
        """One entry a matrix."""
        return (len(self.tensors),)

    @property
    def n_elements(self) -> int:
        """Matrices."""
        return len(self.tensors)

    def read(self, first: int, end: int) -> NDArray[np.float32]:
        """What to multiply matrices `first` to `end` by: shape `(end - first,)`."""
        values = np.concatenate([tensor.read(0, 1) for tensor in self.tensors[first:end]])
        with np.errstate(all="ignore"):
            return np.reciprocal(values) if self.is_divisor else values


def _fp8_table(n_mantissa: int, has_infinity: bool) -> NDArray[np.float32]:
    """The value of each code of an 8-bit float with a sign bit."""
    codes = np.arange(256)
    n_exponent = 7 - n_mantissa
    exponent = (codes >> n_mantissa) & (2**n_exponent - 1)
    mantissa = (codes & (2**n_mantissa - 1)) / 2**n_mantissa
    bias = 2 ** (n_exponent - 1) - 1
    magnitude = np.where(
        exponent == 0, np.ldexp(mantissa, 1 - bias), np.ldexp(1 + mantissa, exponent - bias)
    )
    if has_infinity:
        special = exponent == 2**n_exponent - 1
        magnitude[special] = np.where(mantissa[special] == 0, np.inf, np.nan)
    else:
        magnitude[(codes & 0x7F) == 0x7F] = np.nan
    values: NDArray[np.float32] = np.where(codes < 128, magnitude, -magnitude).astype(np.float32)
    return values


FP8_VALUES = {
    "F8_E4M3": _fp8_table(n_mantissa=3, has_infinity=False),
    "F8_E5M2": _fp8_table(n_mantissa=2, has_infinity=True),
}
_E2M1_VALUES = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
)
_BYTES = np.arange(256)
_PAIR_VALUES = np.stack([_E2M1_VALUES[_BYTES & 0x0F], _E2M1_VALUES[_BYTES >> 4]], axis=1)
"""The two elements in each byte of codes, `(256, 2)`."""
