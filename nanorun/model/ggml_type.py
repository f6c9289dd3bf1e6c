"""The tensor types of ggml: their ids in a file, block sizes and bytes per block.

Ids come from ggml.h, sizes from ggml-common.h. Removed types (ids 4, 5, 31-33, 36-38) are not
members, so a file that uses one is refused as an unknown type.
"""

from __future__ import annotations

import difflib
from enum import IntEnum

from nanorun.errors import UsageError

QK_K = 256
"""Elements of a K-quant or IQ super-block."""


class GgmlType(IntEnum):
    """How the elements of a tensor are stored."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42

    @property
    def block_size(self) -> int:
        """Elements stored together; the length of a row must be a multiple of it."""
        return _SIZES[self][0]

    @property
    def type_size(self) -> int:
        """Bytes of one block."""
        return _SIZES[self][1]

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.type_size / self.block_size

    @property
    def is_quantized(self) -> bool:
        """Whether elements share a block, instead of each being a number of its own."""
        return self.block_size > 1

    @property
    def label(self) -> str:
        """The name in lower case, as flags, recipes and tables write it."""
        return self.name.lower()

    def row_bytes(self, n_per_row: int) -> int:
        """Bytes of a row of `n_per_row` elements.

        Raises:
            ValueError: If the row is not a whole number of blocks.
        """
        if n_per_row % self.block_size:
            raise ValueError(
                f"{self.label} stores blocks of {self.block_size},"
                f" which do not divide a row of {n_per_row}"
            )
        return n_per_row // self.block_size * self.type_size

    @classmethod
    def from_name(cls, name: str) -> GgmlType:
        """The type called `name`, in any case.

        Raises:
            UsageError: If there is none; the nearest names are offered.
        """
        found = cls.__members__.get(name.upper())
        if found is None:
            nearest = difflib.get_close_matches(name.lower(), [t.label for t in cls], n=3)
            fact = f"nearest: {', '.join(nearest)}" if nearest else f"known: {all_labels()}"
            raise UsageError(f"no ggml type is called {name!r}", facts=[fact])
        return found


# (elements per block, bytes per block)
_SIZES: dict[GgmlType, tuple[int, int]] = {
    GgmlType.F32: (1, 4),
    GgmlType.F16: (1, 2),
    GgmlType.Q4_0: (32, 18),
    GgmlType.Q4_1: (32, 20),
    GgmlType.Q5_0: (32, 22),
    GgmlType.Q5_1: (32, 24),
    GgmlType.Q8_0: (32, 34),
    GgmlType.Q8_1: (32, 36),
    GgmlType.Q2_K: (QK_K, 84),
    GgmlType.Q3_K: (QK_K, 110),
    GgmlType.Q4_K: (QK_K, 144),
    GgmlType.Q5_K: (QK_K, 176),
    GgmlType.Q6_K: (QK_K, 210),
    GgmlType.Q8_K: (QK_K, 292),
    GgmlType.IQ2_XXS: (QK_K, 66),
    GgmlType.IQ2_XS: (QK_K, 74),
    GgmlType.IQ3_XXS: (QK_K, 98),
    GgmlType.IQ1_S: (QK_K, 50),
    GgmlType.IQ4_NL: (32, 18),
    GgmlType.IQ3_S: (QK_K, 110),
    GgmlType.IQ2_S: (QK_K, 82),
    GgmlType.IQ4_XS: (QK_K, 136),
    GgmlType.I8: (1, 1),
    GgmlType.I16: (1, 2),
    GgmlType.I32: (1, 4),
    GgmlType.I64: (1, 8),
    GgmlType.F64: (1, 8),
    GgmlType.IQ1_M: (QK_K, 56),
    GgmlType.BF16: (1, 2),
    GgmlType.TQ1_0: (QK_K, 54),
    GgmlType.TQ2_0: (QK_K, 66),
    GgmlType.MXFP4: (32, 17),
    GgmlType.NVFP4: (64, 36),
    GgmlType.Q1_0: (128, 18),
    GgmlType.Q2_0: (64, 18),
}


def all_labels() -> str:
    """Every type's label, for messages."""
    return " ".join(t.label for t in GgmlType)
