"""Finds an expression in a text, whatever it looks for, in bounded time.

All places where a part may end are followed at once, so that no text makes it slow; the `re` of
Python means other things by the same signs and may take for ever.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from nanorun.chat.schema.pattern.nodes import (
    WORD,
    Anchor,
    Back,
    Chars,
    Choice,
    Expression,
    Group,
    Look,
    Node,
    Property,
    Ranges,
    Repeat,
    Sequence,
)

_MOST_STEPS = 2_000_000
_CATEGORIES = {
    "Letter": "L", "Lowercase_Letter": "Ll", "Uppercase_Letter": "Lu", "Titlecase_Letter": "Lt",
    "Modifier_Letter": "Lm", "Other_Letter": "Lo", "Mark": "M", "Number": "N",
    "Decimal_Number": "Nd", "Punctuation": "P", "Symbol": "S", "Separator": "Z",
    "Space_Separator": "Zs", "Other": "C", "Control": "Cc",
}  # fmt: skip
_SHORT = re.compile("L[ultmo]?|M[nce]?|N[dlo]?|P[cdseifo]?|S[mcko]?|Z[slp]?|C[cfson]?")

Place = tuple[int, tuple[tuple[int, str], ...]]
"""Where a match stands: the next character's index, and what the groups hold."""


class Undecided(Exception):
    """Whether an expression matches cannot be told.

    It takes too long, or asks for a property that Python's tables of Unicode do not hold.
    """


def is_found(expression: Expression, text: str) -> bool:
    """Whether the expression matches anywhere in the text.

    Raises:
        Undecided: If that cannot be told.
    """
    matcher = _Matcher(expression, text)
    starts: set[Place] = {(i, ()) for i in range(len(text) + 1)}
    return bool(matcher.ends(expression.node, starts))


class _Matcher:
    def __init__(self, expression: Expression, text: str) -> None:
        self._text = text
        self._names = expression.names
        self._captures = expression.has_backreference
        self._n_steps = 0

    def ends(self, node: Node, places: set[Place]) -> set[Place]:
        """Where `node` may end if it begins at one of the places."""
        self._n_steps += len(places) + 1
        if self._n_steps > _MOST_STEPS:
            raise Undecided("it takes too long")
        if not places:
            return places
        match node:
            case Chars():
                return {(at + 1, held) for at, held in places if self._fits(node, at)}
            case Sequence(items):
                for item in items:
                    places = self.ends(item, places)
                return places
            case Choice(options):
                return set().union(*(self.ends(option, places) for option in options))
            case Repeat():
                return self._repeat(node, places)
            case Group(inner, index):
                return self._group(inner, index, places)
            case Anchor(kind):
                return {place for place in places if self._is_at(kind, place[0])}
            case Look():
                return self._look(node, places)
            case Back(group):
                return set(self._again(group, places))

    def _repeat(self, node: Repeat, places: set[Place]) -> set[Place]:
        for _ in range(node.least):
            places = self._round(node, places)
        reached, fresh, n_rounds = places, places, node.least
        while fresh and (node.most is None or n_rounds < node.most):
            fresh = self._round(node, fresh) - reached
            reached = reached | fresh
            n_rounds += 1
        return reached

    def _round(self, node: Repeat, places: set[Place]) -> set[Place]:
        if node.groups:
            places = {
                (at, tuple(h for h in held if h[0] not in node.groups)) for at, held in places
            }
        return self.ends(node.node, places)

    def _group(self, inner: Node, index: int | None, places: set[Place]) -> set[Place]:
        if index is None or not self._captures:
            return self.ends(inner, places)
        found: set[Place] = set()
        for start in places:
            for end, held in self.ends(inner, {start}):
                others = tuple(h for h in held if h[0] != index)
                found.add((end, (*others, (index, self._text[start[0] : end]))))
        return found

    def _look(self, node: Look, places: set[Place]) -> set[Place]:
        found: set[Place] = set()
        for at, held in places:
            if node.behind:
                starts = {(start, held) for start in range(at + 1)}
                ends = {(at, h) for end, h in self.ends(node.node, starts) if end == at}
            else:
                ends = {(at, h) for _, h in self.ends(node.node, {(at, held)})}
            if node.negated:
                ends = set() if ends else {(at, held)}
            found |= ends
        return found

    def _again(self, group: int | str, places: set[Place]) -> Iterable[Place]:
        index = self._names[group] if isinstance(group, str) else group
        for at, held in places:
            text = dict(held).get(index, "")  # a group that took no part is no text
            if self._text.startswith(text, at):
                yield at + len(text), held

    def _is_at(self, kind: str, at: int) -> bool:
        if kind in "^$":
            return at == (0 if kind == "^" else len(self._text))
        is_edge = self._is_word(at - 1) != self._is_word(at)
        return is_edge == (kind == "b")

    def _is_word(self, at: int) -> bool:
        return 0 <= at < len(self._text) and _is_in(WORD, ord(self._text[at]))

    def _fits(self, chars: Chars, at: int) -> bool:
        if at >= len(self._text):
            return False
        char = self._text[at]
        spellings = {char, char.lower(), char.upper()} if chars.any_case else {char}
        return any(
            len(spelling) == 1
            and (
                _is_in(chars.ranges, ord(spelling))
                or any(_has_property(spelling, p) for p in chars.properties)
            )
            != chars.negated
            for spelling in spellings
        )


def _is_in(ranges: Ranges, code: int) -> bool:
    return any(low <= code <= high for low, high in ranges)


def _has_property(char: str, wanted: Property) -> bool:
    name = wanted.name.removeprefix("General_Category=").removeprefix("gc=")
    category = _CATEGORIES.get(name, name)
    if not _SHORT.fullmatch(category):
        raise Undecided(f"\\p{{{wanted.name}}} is not known here")
    return unicodedata.category(char).startswith(category) != wanted.negated
