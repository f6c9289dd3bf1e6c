"""ggml's slow types encoded by torch: on a GPU many times as fast, and nearer to the numbers.

The search in `codecs.torch_fit` looks harder than ggml's for the least weighted error, so its bytes
are not those of ggml's quantizers, only as valid. Import this where torch is wanted; it takes
seconds and hundreds of megabytes.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

from nanorun.model.ggml_type import GgmlType
from nanorun_quant.codecs.torch_pack import ENCODERS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Some 40 arrays of this many float32 are there at the same time.
_BATCH_ELEMENTS = {"cuda": 2**20, "cpu": 2**16}


class TorchQuantizer:
    """Encoders on one device; every method may be called from several threads.

    Args:
        device: `cuda` or `cpu`.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._n_batch = _BATCH_ELEMENTS[device]
        # One batch at a time: more would take more memory and be no faster.
        self._lock = threading.Lock()

    def quantize(
        self,
        data: NDArray[np.float32],
        type_: GgmlType,
        weights: NDArray[np.float32] | None = None,
    ) -> NDArray[np.uint8]:
        """Encode rows of finite numbers.

        Args:
            data: `(n_rows, n_per_row)`; rows are whole blocks.
            type_: One of `ENCODERS`.
            weights: Weight of each column's squared error, `(n_per_row,)`.

        Returns:
            The bytes, `(n_rows, row_bytes)`.
        """
        with self._lock, torch.inference_mode():
            return self._quantize(data, type_, weights)

    def _quantize(
        self, data: NDArray[np.float32], type_: GgmlType, weights: NDArray[np.float32] | None
    ) -> NDArray[np.uint8]:
        size = type_.block_size
        blocks = torch.from_numpy(data).reshape(-1, size)
        of_row = torch.ones(1, size)
        if weights is not None:
            of_row = torch.from_numpy(weights).reshape(-1, size)
        of_row = of_row.to(self._device)
        raw = torch.empty((len(blocks), type_.type_size), dtype=torch.uint8)
        n_batch = self._n_batch // size
        for start in range(0, len(blocks), n_batch):
            x = blocks[start : start + n_batch].to(self._device)
            places = torch.arange(start, start + len(x), device=self._device) % len(of_row)
            raw[start : start + len(x)] = ENCODERS[type_](x, _weighted(x, of_row[places]))[0].cpu()
        found: NDArray[np.uint8] = raw.numpy().reshape(len(data), -1)
        return found


def _weighted(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Weights of blocks' errors in which large numbers count more, as in ggml's quantizers.

    The least plain error shrinks numbers a little, all in one direction, which adds up through the
    layers: pico's KL divergence as Q4_K was 0.035 with it and 0.030 so (two texts, with and
    without an imatrix).
    """
    return w * (2 * x.square().mean(1, keepdim=True) + x.square()).sqrt()
