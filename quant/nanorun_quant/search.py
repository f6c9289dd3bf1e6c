"""Spending a budget of bytes where it lowers the error most.

Every tensor has candidates, each so many bytes and so much error; errors add up. Minimising
`error + price * bytes` takes each tensor on its own (Everett 1963; for bit allocation, Shoham and
Gersho 1988), and as the price falls, each tensor climbs the lower convex hull of its candidates.
Walking all hulls together, steepest step first, therefore gives the best assignment for every
budget it passes. What is left of the budget before the next step is spent on the best single
changes that still fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanorun.model.ggml_type import GgmlType


@dataclass(frozen=True, slots=True)
class Candidate:
    """One type a tensor could have."""

    type: GgmlType
    n_bytes: int
    error: float


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor, or several that get the same type."""

    name: str
    candidates: tuple[Candidate, ...]


def allocate(items: Sequence[Item], budget: int) -> list[Candidate] | None:
    """The candidate of each item that together have least error within `budget` bytes.

    Returns:
        One candidate an item, or None where even the smallest do not fit.
    """
    hulls = [_hull(item.candidates) for item in items]
    chosen = [hull[0] for hull in hulls]
    spent = sum(candidate.n_bytes for candidate in chosen)
    if spent > budget:
        return None
    for i, step in sorted(_steps(hulls), key=lambda pair: _slope(*pair[1]), reverse=True):
        before, after = step
        grown = spent + after.n_bytes - before.n_bytes
        if chosen[i] is before and grown <= budget:
            chosen[i], spent = after, grown
    _spend_rest(items, chosen, budget - spent)
    return chosen


def _hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that are best for some price, smallest first."""
    hull: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.n_bytes, c.error)):
        if hull and candidate.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], candidate):
            hull.pop()
        hull.append(candidate)
    return hull


Step = tuple[Candidate, Candidate]


def _steps(hulls: Sequence[Sequence[Candidate]]) -> list[tuple[int, Step]]:
    return [
        (i, (hull[j], hull[j + 1])) for i, hull in enumerate(hulls) for j in range(len(hull) - 1)
    ]


def _slope(before: Candidate, after: Candidate) -> float:
    """Error that each byte more takes away."""
    return (before.error - after.error) / max(1, after.n_bytes - before.n_bytes)


def _spend_rest(items: Sequence[Item], chosen: list[Candidate], rest: int) -> None:
    """Take single changes, the best first, while one fits."""
    while True:
        changes = [
            (now.error - candidate.error, -i, candidate)
            for i, (item, now) in enumerate(zip(items, chosen, strict=True))
            for candidate in item.candidates
            if candidate.error < now.error and candidate.n_bytes - now.n_bytes <= rest
        ]
        if not changes:
            return
        _, minus_i, candidate = max(changes, key=lambda change: change[:2])
        rest -= candidate.n_bytes - chosen[-minus_i].n_bytes
        chosen[-minus_i] = candidate
