"""Numbers into the bytes of a type, by the better of the encoders there are for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nanorun.model.ggml_type import GgmlType
from nanorun_quant.codecs import q2_0
from nanorun_quant.ggml import Ggml, UnquantizableError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def encode(
    ggml: Ggml,
    data: NDArray[np.float32],
    type_: GgmlType,
    weights: NDArray[np.float32] | None = None,
) -> NDArray[np.uint8]:
    """Encode rows as `type_`; bytes are ggml's own, except for Q2_0 (see `codecs.q2_0`).

    Args:
        ggml: The library.
        data: `(n_rows, n_per_row)`.
        type_: The type.
        weights: Weight of each column's squared error, `(n_per_row,)`.

    Returns:
        The bytes, `(n_rows, row_bytes)`.

    Raises:
        UnquantizableError: If the type cannot hold a number.
    """
    if type_ is not GgmlType.Q2_0:
        return ggml.quantize(data, type_, weights)
    if not np.isfinite(data).all():
        # ggml's check says where.
        ggml.quantize(data, type_)
        raise UnquantizableError("an element is not finite")
    return q2_0.encode(data, weights)


def squared_error(
    ggml: Ggml,
    data: NDArray[np.float32],
    type_: GgmlType,
    weights: NDArray[np.float32] | None = None,
) -> float:
    """What encoding as `type_` adds: the sum of weighted squared differences."""
    raw = encode(ggml, data, type_, weights)
    difference = ggml.dequantize(raw, type_, data.shape[1]).astype(np.float64) - data
    squares = np.square(difference).sum(axis=0)
    return float(squares.sum() if weights is None else squares @ weights)
