"""What a regular expression consists of."""

from __future__ import annotations

from dataclasses import dataclass, field

Ranges = tuple[tuple[int, int], ...]
"""Code points, as inclusive ranges in ascending order that do not touch."""

LAST = 0x10FFFF


@dataclass(frozen=True, slots=True)
class Property:
    r"""`\p{NAME}`, or `\P{NAME}`."""

    name: str
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of a set."""

    ranges: Ranges
    properties: tuple[Property, ...] = ()
    """Further members, beside the ranges."""
    negated: bool = False
    """Any other character instead; only where there are properties."""
    any_case: bool = False


@dataclass(frozen=True, slots=True)
class Sequence:
    """One thing after the other."""

    items: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several."""

    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """What stands in parentheses."""

    node: Node
    index: int | None = None
    """Its number, if it captures."""


@dataclass(frozen=True, slots=True)
class Repeat:
    """Something several times."""

    node: Node
    least: int
    most: int | None
    groups: frozenset[int] = frozenset()
    """Groups inside, which every round captures anew."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """A place: `^`, `$`, `b` for a word's edge, `B` for any other place."""

    kind: str


@dataclass(frozen=True, slots=True)
class Look:
    """What must, or must not, stand ahead or behind."""

    node: Node
    behind: bool
    negated: bool


@dataclass(frozen=True, slots=True)
class Back:
    """The text of a group again."""

    group: int | str
    """Its number or name."""


Node = Chars | Sequence | Choice | Group | Repeat | Anchor | Look | Back


@dataclass(frozen=True, slots=True)
class Expression:
    """A whole regular expression."""

    source: str
    node: Node
    names: dict[str, int] = field(default_factory=dict)
    """Numbers of the named groups."""
    has_backreference: bool = False


def join_ranges(ranges: list[tuple[int, int]]) -> Ranges:
    """The same code points in ascending ranges that do not touch."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return tuple(joined)


def complement(ranges: Ranges) -> Ranges:
    """All other code points."""
    gaps, start = [], 0
    for low, high in ranges:
        if start < low:
            gaps.append((start, low - 1))
        start = high + 1
    return (*gaps, (start, LAST)) if start <= LAST else tuple(gaps)


DIGITS: Ranges = ((0x30, 0x39),)
WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
LINE_ENDS: Ranges = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
SPACE: Ranges = join_ranges([
    (0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A),
    (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
])  # fmt: skip
"""ECMA 262's white space and line ends."""
ANYTHING = Chars(((0, LAST),))
