"""ggml's bits of Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL and IQ4_XS, made of fitted blocks.

The layouts are those of `ggml-common.h`. Each encoder takes blocks of elements and of weights, both
`(n_blocks, block_size)`, and gives the bytes `(n_blocks, type_size)` and the numbers they stand
for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nanorun.model.ggml_type import GgmlType
from nanorun_quant.codecs.torch_fit import Levels, Scaled, fit_offset, fit_scaled

IQ4_LEVELS = Levels((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
"""`kvalues_iq4nl` of ggml-common.h."""
_Q6_LEVELS = Levels(tuple(range(-32, 32)))
_Q3_LEVELS = Levels(tuple(range(-4, 4)))

Encoded = tuple[Tensor, Tensor]
"""Bytes `(n_blocks, type_size)`, and the numbers they stand for, `(n_blocks, block_size)`."""


def iq4_nl(x: Tensor, w: Tensor) -> Encoded:
    """`d`, then two elements a byte, 16 apart."""
    fit = _fit_scaled(x, w, 32, IQ4_LEVELS, (1, 1))
    return torch.cat([_half_bytes(fit.d), _nibbles(fit.places)], 1), fit.values.flatten(1)


def iq4_xs(x: Tensor, w: Tensor) -> Encoded:
    """`d`, high and low bits of the 8 scales, then the sub-blocks as in IQ4_NL."""
    fit = _fit_scaled(x, w, 32, IQ4_LEVELS, (-32, 31))
    s = (fit.scales + 32).long()
    low = (s[:, 0::2] & 15) | (s[:, 1::2] & 15) << 4
    high = [_joined(s[:, i : i + 4] >> 4, 2) for i in (0, 4)]
    parts = [_half_bytes(fit.d), _bytes(torch.stack(high, 1)), _bytes(low), _nibbles(fit.places)]
    return torch.cat(parts, 1), fit.values.flatten(1)


def q3_k(x: Tensor, w: Tensor) -> Encoded:
    """High bits, low pairs of bits, the 16 scales in 6 bits, `d`."""
    fit = _fit_scaled(x, w, 16, _Q3_LEVELS, (-32, 31))
    # 2 halves of 4 runs of 32 elements.
    q = fit.places.reshape(len(x), 2, 4, 32)
    high = _joined((q >> 2).reshape(len(x), 8, 32).transpose(1, 2), 1)
    low = _joined((q & 3).transpose(2, 3), 2).flatten(1)
    s = (fit.scales + 32).long()
    scales = [(s[:, :8] & 15) | (s[:, 8:] & 15) << 4]
    scales += [_joined((s >> 4).reshape(len(x), 4, 4).transpose(1, 2), 2)]
    parts = [_bytes(high), _bytes(low), *map(_bytes, scales), _half_bytes(fit.d)]
    return torch.cat(parts, 1), fit.values.flatten(1)


def q6_k(x: Tensor, w: Tensor) -> Encoded:
    """Low nibbles, high pairs of bits, the 16 scales in 8 bits, `d`."""
    fit = _fit_scaled(x, w, 16, _Q6_LEVELS, (-128, 127))
    q = fit.places.reshape(len(x), 2, 4, 32)
    low = ((q[:, :, :2] & 15) | (q[:, :, 2:] & 15) << 4).flatten(1)
    high = _joined((q >> 4).transpose(2, 3), 2).flatten(1)
    scales = fit.scales.to(torch.int8).view(torch.uint8)
    parts = [_bytes(low), _bytes(high), scales, _half_bytes(fit.d)]
    return torch.cat(parts, 1), fit.values.flatten(1)


def q4_k(x: Tensor, w: Tensor) -> Encoded:
    """`d`, `m`, 8 scales and offsets in 6 bits, then nibbles of two sub-blocks a byte."""
    return _offset_k(x, w, 4)


def q5_k(x: Tensor, w: Tensor) -> Encoded:
    """As Q4_K, and the fifth bits of all 8 sub-blocks in a byte before the nibbles."""
    return _offset_k(x, w, 5)


ENCODERS: dict[GgmlType, Callable[[Tensor, Tensor], Encoded]] = {
    GgmlType.Q3_K: q3_k,
    GgmlType.Q4_K: q4_k,
    GgmlType.Q5_K: q5_k,
    GgmlType.Q6_K: q6_k,
    GgmlType.IQ4_NL: iq4_nl,
    GgmlType.IQ4_XS: iq4_xs,
}


def _offset_k(x: Tensor, w: Tensor, n_bits: int) -> Encoded:
    fit = fit_offset(x.reshape(len(x), 8, 32), w.reshape(len(x), 8, 32), 2**n_bits - 1)
    s, t, q = fit.scales.long(), fit.offsets.long(), fit.levels.long()
    first, last = slice(0, 4), slice(4, 8)
    packed = [
        s[:, first] | (s[:, last] >> 4) << 6,
        t[:, first] | (t[:, last] >> 4) << 6,
        (s[:, last] & 15) | (t[:, last] & 15) << 4,
    ]
    parts = [_half_bytes(fit.d), _half_bytes(fit.m), *map(_bytes, packed)]
    if n_bits == 5:
        parts.append(_bytes(_joined((q >> 4).transpose(1, 2), 1)))
    parts.append(_bytes(((q[:, 0::2] & 15) | (q[:, 1::2] & 15) << 4).flatten(1)))
    return torch.cat(parts, 1), fit.values.flatten(1)


def _fit_scaled(
    x: Tensor, w: Tensor, n_sub: int, levels: Levels, scale_range: tuple[int, int]
) -> Scaled:
    shape = (len(x), -1, n_sub)
    return fit_scaled(x.reshape(shape), w.reshape(shape), levels, scale_range)


def _nibbles(places: Tensor) -> Tensor:
    """Sub-blocks of 32 as 16 bytes each: element i low, element i + 16 high."""
    return _bytes((places[..., :16] | places[..., 16:] << 4).flatten(1))


def _joined(parts: Tensor, n_bits: int) -> Tensor:
    """Numbers of `n_bits` in the last dimension put together, the first in the lowest bits."""
    shifts = torch.arange(parts.shape[-1], device=parts.device) * n_bits
    return (parts << shifts).sum(-1)


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.to(torch.uint8)


def _half_bytes(d: Tensor) -> Tensor:
    return d.half()[:, None].view(torch.uint8)
