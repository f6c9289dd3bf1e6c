"""Scales and levels of least weighted error for blocks of numbers, on whichever device they are.

Three forms, which the packers of `torch_pack` turn into ggml's bits:

    one scale       x = d v           v from a table of levels                 IQ4_NL
    two scales      x = d s v         s whole, one a sub-block                 Q6_K  Q3_K  IQ4_XS
    with offsets    x = d s q - m t   s, t whole, q from 0                     Q4_K  Q5_K

For given levels the best scale is known in closed form; for a given scale the nearest levels are.
So each search starts from many scales, keeps the best, and takes turns from there. What is kept is
only ever replaced by what is better, measured on the numbers that the file will really hold, with
`d` and `m` rounded to float16.

    S super-blocks   N sub-blocks of one   K elements of a sub-block
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

_N_STARTS = 21
"""Scales tried for each end of the levels."""
_N_TURNS = 3
_N_OFFSET_STARTS = 37
_MAX_SCALE = 63
"""Of a sub-block in Q4_K and Q5_K: 6 bits."""
_STEPS = 16
"""Of a level's unit, in the table of nearest levels."""
_SINGULAR = 1e-6
"""Of a determinant against its diagonal: below it, rounding is all that is left."""
_TINY = 2.0**-24
"""The smallest float16 above 0."""


@dataclass(frozen=True, slots=True)
class Levels:
    """A table of levels, ascending."""

    values: tuple[int, ...]

    def place_of(self, x: Tensor) -> Tensor:
        """The place of the level that is nearest to each number; any shape in, the same out."""
        low, high = self.values[0], self.values[-1]
        if high - low + 1 == len(self.values):
            return (x.round() - low).clamp(0, high - low).long()
        steps = (x * _STEPS).round().clamp(low * _STEPS, high * _STEPS) - low * _STEPS
        return _lookup_table(self, x.device)[steps.long()]

    def at(self, places: Tensor) -> Tensor:
        """The levels at these places; any shape in, the same out."""
        return torch.tensor(self.values, dtype=torch.float32, device=places.device)[places]

    def nearest(self, x: Tensor) -> Tensor:
        """The level that is nearest to each number; any shape in, the same out."""
        return self.at(self.place_of(x))

    @property
    def gap(self) -> float:
        """How far apart two levels are, on average."""
        return (self.values[-1] - self.values[0]) / (len(self.values) - 1)


@cache
def _lookup_table(levels: Levels, device: torch.device) -> Tensor:
    """The place of the nearest level, for numbers in steps: many times as fast as to search."""
    table = torch.tensor(levels.values, dtype=torch.float32)
    n_steps = (levels.values[-1] - levels.values[0]) * _STEPS + 1
    numbers = levels.values[0] + torch.arange(n_steps) / _STEPS
    return torch.bucketize(numbers, (table[1:] + table[:-1]) / 2).to(device)


class Scaled(NamedTuple):
    """Blocks as `d s v`."""

    d: Tensor
    """`(S,)`, each a float16's value."""
    scales: Tensor
    """`s`, whole numbers `(S, N)`."""
    places: Tensor
    """Of the levels in their table, `(S, N, K)`."""
    values: Tensor
    """The numbers these stand for, `(S, N, K)`."""


class Offset(NamedTuple):
    """Blocks as `d s q - m t`."""

    d: Tensor
    m: Tensor
    """`(S,)`, each a float16's value."""
    scales: Tensor
    offsets: Tensor
    """`s` and `t`, whole numbers `(S, N)`."""
    levels: Tensor
    """`q`, `(S, N, K)`."""
    values: Tensor
    """The numbers these stand for, `(S, N, K)`."""


F = TypeVar("F", Scaled, Offset)


def fit_scaled(x: Tensor, w: Tensor, levels: Levels, scale_range: tuple[int, int]) -> Scaled:
    """Fit `d s v` to blocks `x` `(S, N, K)` of weights `w`.

    With `scale_range` `(1, 1)` there is one scale: `s` is 1 throughout.
    """
    low, high = scale_range
    wanted = _best_scales(x, w, levels)
    i_largest = wanted.abs().argmax(1, keepdim=True)
    # The larger end of the range goes to the sub-block of the largest scale.
    d = _half(wanted.gather(1, i_largest)[:, 0] / (low if -low > high else high))
    best = _scaled(x, w, levels, scale_range, d, wanted)
    for _ in range(_N_TURNS):
        v = levels.at(best.places) * best.scales[..., None]
        d = _half(_ratio((w * x * v).sum((1, 2)), (w * v * v).sum((1, 2))))
        best = _better_blocks(x, w, best, _scaled(x, w, levels, scale_range, d, wanted))
    # Numbers far below float16's are nearer to 0 than to any level that it leaves.
    return _better_blocks(x, w, best, _scaled(x, w, levels, scale_range, best.d * 0, wanted))


def fit_offset(x: Tensor, w: Tensor, q_max: int) -> Offset:
    """Fit `d s q - m t` to blocks `x` `(S, N, K)` of weights `w`, `q` from 0 to `q_max`."""
    slopes, offsets = _best_lines(x, w, q_max)
    d, m = _half(slopes.amax(1) / _MAX_SCALE), _half(offsets.amax(1) / _MAX_SCALE)
    best = _offset(x, w, q_max, d, m, slopes, offsets)
    for _ in range(_N_TURNS):
        d, m = map(_half, _best_pair(x, w, best))
        best = _better_blocks(x, w, best, _offset(x, w, q_max, d, m, slopes, offsets))
    return best


def _best_scales(x: Tensor, w: Tensor, levels: Levels) -> Tensor:
    """The scale `(S, N)` of least error for each sub-block, as a real number.

    The error of levels `v` at their best scale `P / Q`, with `P = sum(w v x)`, `Q = sum(w v v)`,
    falls short of that of zeros by `P² / Q`.
    """
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    scales = torch.zeros_like(largest[..., 0])
    gains = torch.zeros_like(scales)

    def consider(inverse: Tensor) -> None:
        nonlocal scales, gains
        v = levels.nearest(x * inverse[..., None])
        p, q = (w * v * x).sum(-1), (w * v * v).sum(-1)
        scale = _ratio(p, q)
        gain = scale * p
        scales = torch.where(gain > gains, scale, scales)
        gains = torch.maximum(gains, gain)

    for end in (levels.values[0], levels.values[-1]):
        for step in torch.linspace(-1, 1, _N_STARTS).tolist():
            consider(_ratio(torch.full_like(largest, end + step * levels.gap), largest)[..., 0])
    for _ in range(_N_TURNS):
        consider(_ratio(torch.ones_like(scales), scales))
    return scales


def _scaled(
    x: Tensor, w: Tensor, levels: Levels, scale_range: tuple[int, int], d: Tensor, wanted: Tensor
) -> Scaled:
    """The whole scales that do best with `d`, near those that are `wanted`."""
    inverse = _ratio(torch.ones_like(d), d)
    nearest = (wanted * inverse[:, None]).round()
    best: tuple[Tensor, ...] | None = None
    for step in (0, -1, 1):
        scales = (nearest + step).clamp(*scale_range)
        factor = (d[:, None] * scales)[..., None]
        places = levels.place_of(x * _ratio(torch.ones_like(factor), factor))
        values = factor * levels.at(places)
        best = _better(best, (_error(x, w, values), scales, places, values))
    assert best is not None
    return Scaled(d, *best[1:])


def _best_lines(x: Tensor, w: Tensor, q_max: int) -> tuple[Tensor, Tensor]:
    """Slope and offset `(S, N)`, neither negative, of least error for each sub-block."""
    low, high = x.amin(-1).clamp(max=0), x.amax(-1)
    sum_w, sum_x = w.sum(-1), (w * x).sum(-1)
    level = -_ratio(sum_x, sum_w).clamp(max=0)
    best: tuple[Tensor, ...] = (
        _error(x, w, -level[..., None]), torch.zeros_like(level), level
    )  # fmt: skip

    def consider(slope: Tensor, offset: Tensor) -> None:
        nonlocal best
        inverse = _ratio(torch.ones_like(slope), slope)[..., None]
        q = ((x + offset[..., None]) * inverse).round().clamp(0, q_max)
        wq = w * q
        sum_q, sum_qq, sum_qx = wq.sum(-1), (wq * q).sum(-1), (wq * x).sum(-1)
        determinant = sum_w * sum_qq - sum_q * sum_q
        offset = -_ratio(sum_qq * sum_x - sum_q * sum_qx, determinant)
        slope = _ratio(sum_w * sum_qx - sum_q * sum_x, determinant)
        # Without an offset where the best one has the wrong sign, or all levels are the same.
        alone = (offset < 0) | (determinant <= _SINGULAR * sum_w * sum_qq)
        slope = torch.where(alone, _ratio(sum_qx, sum_qq), slope).clamp(min=0)
        offset = torch.where(alone, 0.0, offset)
        values = slope[..., None] * q - offset[..., None]
        best = _better(best, (_error(x, w, values), slope, offset))

    for step in torch.linspace(-0.9, 0.9, _N_OFFSET_STARTS).tolist():
        consider((high - low) / (q_max + step), -low)
    for _ in range(_N_TURNS):
        consider(*best[1:])
    return best[1], best[2]


def _best_pair(x: Tensor, w: Tensor, fit: Offset) -> tuple[Tensor, Tensor]:
    """`d` and `m` of least error for given scales, offsets and levels."""
    a = fit.scales[..., None] * fit.levels
    b = fit.offsets[..., None].expand_as(a)
    aa, bb, ab = ((w * u * v).sum((1, 2)) for u, v in ((a, a), (b, b), (a, b)))
    ax, bx = (w * a * x).sum((1, 2)), (w * b * x).sum((1, 2))
    determinant = aa * bb - ab * ab
    d = _ratio(ax * bb - bx * ab, determinant)
    m = _ratio(ax * ab - bx * aa, determinant)
    alone = (m < 0) | (determinant <= _SINGULAR * aa * bb)
    d = torch.where(alone, _ratio(ax, aa), d)
    return d.clamp(min=0), torch.where(alone, 0.0, m)


def _offset(
    x: Tensor, w: Tensor, q_max: int, d: Tensor, m: Tensor, slopes: Tensor, offsets: Tensor
) -> Offset:
    """The whole scales and offsets that do best with `d` and `m`, near those that are wanted."""
    near_s = (slopes * _ratio(torch.ones_like(d), d)[:, None]).round()
    near_t = (offsets * _ratio(torch.ones_like(m), m)[:, None]).round()
    best: tuple[Tensor, ...] | None = None
    for step_s in (0, -1, 1):
        for step_t in (0, -1, 1):
            s = (near_s + step_s).clamp(0, _MAX_SCALE)
            t = (near_t + step_t).clamp(0, _MAX_SCALE)
            factor, shift = (d[:, None] * s)[..., None], (m[:, None] * t)[..., None]
            inverse = _ratio(torch.ones_like(factor), factor)
            q = ((x + shift) * inverse).round().clamp(0, q_max)
            values = factor * q - shift
            best = _better(best, (_error(x, w, values), s, t, q, values))
    assert best is not None
    return Offset(d, m, *best[1:])


def _error(x: Tensor, w: Tensor, values: Tensor) -> Tensor:
    """Weighted squared error of each sub-block, `(S, N)`."""
    return (w * (values - x).square()).sum(-1)


def _better(best: tuple[Tensor, ...] | None, other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Sub-block by sub-block, the one of less error, which stands first."""
    if best is None:
        return other
    is_better = other[0] < best[0]
    return tuple(_where(is_better, a, b) for a, b in zip(other, best, strict=True))


def _better_blocks(x: Tensor, w: Tensor, best: F, other: F) -> F:
    """Super-block by super-block, the fit of less error."""
    is_better = _error(x, w, other.values).sum(1) < _error(x, w, best.values).sum(1)
    pairs = zip(best._fields, other, best, strict=True)
    return best._replace(**{name: _where(is_better, a, b) for name, a, b in pairs})


def _where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`torch.where` for a condition that lacks the last dimensions."""
    missing = (1,) * (a.dim() - condition.dim())
    return torch.where(condition.reshape(condition.shape + missing), a, b)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, and 0 where that is no number."""
    return (a / b).nan_to_num(0.0, 0.0, 0.0)


def _half(d: Tensor) -> Tensor:
    """What float16 makes of `d`; what is not zero stays so."""
    rounded = d.half().float()
    return torch.where((rounded == 0) & (d != 0), torch.sign(d) * _TINY, rounded)
