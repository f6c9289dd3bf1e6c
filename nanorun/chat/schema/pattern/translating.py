"""Writes an expression in Rust's syntax, so that the whole text is what it asks to be found in.

What a grammar cannot follow (lookaround, word edges, groups that come again) is left out, so the
result takes more texts than the expression, never fewer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nanorun.chat.schema.pattern.nodes import (
    ANYTHING,
    Anchor,
    Back,
    Chars,
    Choice,
    Expression,
    Group,
    Look,
    Node,
    Ranges,
    Repeat,
    Sequence,
)

_MOST_SEQUENCES = 64
_MOST_PARTS = 10_000
"""Characters that an expression spells out, repetitions counted; more make a huge automaton."""
_ANY = r"(?s:.)*"
_SURROGATES = (0xD800, 0xDFFF)


@dataclass(frozen=True, slots=True)
class Translation:
    """An expression for llguidance."""

    regex: str | None
    """Of a whole text; None if it is too large."""
    left_out: str | None
    """What it does not ask for, in words."""


def translate(expression: Expression) -> Translation:
    """Turn a search into Rust's expression of the whole text."""
    if _size(expression.node) > _MOST_PARTS:
        return Translation(None, f"it stands for more than {_MOST_PARTS} characters")
    writer = _Writer()
    options = [writer.whole(items) for items in _sequences(expression.node)]
    return Translation(f"^(?:{'|'.join(options)})$", writer.left_out)


def _size(node: Node) -> int:
    match node:
        case Sequence(items) | Choice(items):
            return 1 + sum(_size(item) for item in items)
        case Group(inner):
            return _size(inner)
        case Repeat(inner, least, most):
            return _size(inner) * max(least, most or 1, 1)
    return 1


def _sequences(node: Node) -> list[tuple[Node, ...]]:
    """The expression as alternatives whose anchors, if at an edge, stand there openly."""
    done: list[tuple[Node, ...]] = []
    waiting = [_items(node)]
    while waiting:
        items = waiting.pop(0)
        place = next((i for i in _edges(items) if _may_open(items[i])), None)
        if place is None or len(done) + len(waiting) > _MOST_SEQUENCES:
            done.append(items)
            continue
        inner = items[place]
        if isinstance(inner, Group):
            inner = inner.node
        options = inner.options if isinstance(inner, Choice) else (inner,)
        opened = [(*items[:place], *_items(option), *items[place + 1 :]) for option in options]
        waiting = opened + waiting
    return done


def _items(node: Node) -> tuple[Node, ...]:
    return node.items if isinstance(node, Sequence) else (node,)


def _edges(items: tuple[Node, ...]) -> Iterable[int]:
    """Places of the first and the last item that are not mere places in the text."""
    solid = [i for i, item in enumerate(items) if not isinstance(item, Anchor | Look)]
    return {solid[0], solid[-1]} if solid else ()


def _may_open(node: Node) -> bool:
    """Whether a group or choice hides an anchor that could be one of the whole text."""
    match node:
        case Group(inner):
            return _has_anchor(inner)
        case Choice():
            return _has_anchor(node)
    return False


def _has_anchor(node: Node) -> bool:
    match node:
        case Anchor(kind):
            return kind in "^$"
        case Sequence(items) | Choice(items):
            return any(map(_has_anchor, items))
        case Group(inner):
            return _has_anchor(inner)
    return False


class _Writer:
    def __init__(self) -> None:
        self.left_out: str | None = None

    def whole(self, items: tuple[Node, ...]) -> str:
        """One alternative, with whatever may stand before and after it."""
        n_places = len(items)
        is_place = [isinstance(item, Anchor | Look) for item in items]
        first = next((i for i in range(n_places) if not is_place[i]), n_places)
        last = next((i for i in range(n_places, first, -1) if not is_place[i - 1]), first)
        head, body, tail = items[:first], items[first:last], items[last:]
        if first == n_places:  # nothing but places, so that each may stand at both ends
            tail = head
        starts, ends = Anchor("^") in head, Anchor("$") in tail
        for item in (*head, *tail):
            if item not in (Anchor("^"), Anchor("$")):
                self.write(item)
        text = "".join(map(self.write, body))
        return f"{'' if starts else _ANY}{text}{'' if ends else _ANY}"

    def write(self, node: Node) -> str:
        """A part; places are noted as left out."""
        match node:
            case Chars():
                return _write_chars(node)
            case Sequence(items):
                return "".join(map(self.write, items))
            case Choice(options):
                return f"(?:{'|'.join(map(self.write, options))})"
            case Group(inner):
                return f"(?:{self.write(inner)})"
            case Repeat(inner, least, most):
                bounds = f"{{{least},{'' if most is None else most}}}"
                return f"(?:{self.write(inner)}){bounds}"
            case Back(group):
                self.left_out = f"what group {group} holds"
                return _ANY
            case Look(behind=behind):
                self.left_out = "what must stand behind" if behind else "what it looks ahead for"
            case Anchor(kind):
                inside = f"the {kind} in its midst"
                self.left_out = inside if kind in "^$" else "where words end"
        return ""


def _write_chars(chars: Chars) -> str:
    if chars == ANYTHING:
        return "(?s:.)"
    ranges = "".join(_write_ranges(chars.ranges))
    properties = "".join(f"\\{'P' if p.negated else 'p'}{{{p.name}}}" for p in chars.properties)
    if not ranges and not properties:
        return r"[^\x{0}-\x{10FFFF}]"
    members = f"[{'^' if chars.negated else ''}{ranges}{properties}]"
    return f"(?i:{members})" if chars.any_case else members


def _write_ranges(ranges: Ranges) -> Iterable[str]:
    """Rust's spelling, without the halves of surrogate pairs, which are no characters there."""
    first, last = _SURROGATES
    for low, high in ranges:
        for start, end in ((low, min(high, first - 1)), (max(low, last + 1), high)):
            if start <= end:
                yield f"\\x{{{start:X}}}-\\x{{{end:X}}}"
