"""Reads ECMA 262's regular expressions; what other dialects mean differently is refused by name."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

from nanorun.chat.schema.pattern.nodes import (
    DIGITS,
    LAST,
    LINE_ENDS,
    SPACE,
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
    complement,
    join_ranges,
)

_MOST_CHARS = 20_000
_MOST_NESTED = 100
_CLASSES = {"d": DIGITS, "w": WORD, "s": SPACE}
_CONTROLS = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D}
_OTHERS = {"A": "^", "Z": "$", "z": "$", "G": "^", "h": "[ \\t]", "R": "\\r?\\n"}
"""Escapes of other dialects, and what says the same."""
_GROUP = re.compile(r"\(\?(?:(:)|(i:)|(<?[=!])|P?<(\w+)>)")
_BRACES = re.compile(r"\{(\d{1,9})(,(\d{0,9}))?\}")
_PROPERTY = re.compile(r"\{(\w+(?:=\w+)?)\}")
_CODE = re.compile(r"x([0-9A-Fa-f]{2})|u\{([0-9A-Fa-f]{1,6})\}|u([0-9A-Fa-f]{4})")
_LOW_HALF = re.compile(r"\\u([dD][c-fC-F][0-9A-Fa-f]{2})")
_REFERENCE = re.compile(r"[1-9]\d?|k<(\w+)>")


class PatternError(ValueError):
    """An expression that has no meaning, or not the same one everywhere."""


@lru_cache(maxsize=512)
def parse_pattern(source: str) -> Expression:
    r"""Read an expression.

    `(?i)` in front, `(?P<name>` and `\u{...}` are read too, since no dialect takes them for
    something else.

    Raises:
        PatternError: If it has no meaning, or another dialect's.
    """
    if len(source) > _MOST_CHARS:
        raise PatternError(f"it has {len(source)} characters, more than {_MOST_CHARS}")
    return _Parser(source).expression()


class _Parser:
    def __init__(self, source: str) -> None:
        self._source = source
        self._at = 0
        self._depth = 0
        self._n_groups = 0
        self._names: dict[str, int] = {}
        self._references: list[int | str] = []
        self._any_case = False

    def expression(self) -> Expression:
        self._any_case = self._take("(?i)")
        node = self._choice()
        if self._at < len(self._source):
            raise PatternError("a ) closes nothing")
        known = {*range(1, self._n_groups + 1), *self._names}
        if unknown := [group for group in self._references if group not in known]:
            raise PatternError(f"it refers to group {unknown[0]}, which it does not have")
        return Expression(self._source, node, self._names, bool(self._references))

    def _take(self, text: str) -> bool:
        """Step over `text` if it comes next."""
        found = self._source.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _match(self, form: re.Pattern[str]) -> re.Match[str] | None:
        """Step over what has that form, if it comes next."""
        found = form.match(self._source, self._at)
        self._at = found.end() if found else self._at
        return found

    def _next(self, what: str) -> str:
        if self._at >= len(self._source):
            raise PatternError(f"it ends within {what}")
        self._at += 1
        return self._source[self._at - 1]

    def _choice(self) -> Node:
        self._depth += 1
        if self._depth > _MOST_NESTED:
            raise PatternError(f"it is nested more than {_MOST_NESTED} deep")
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        self._depth -= 1
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _sequence(self) -> Node:
        items: list[Node] = []
        while self._at < len(self._source) and self._source[self._at] not in "|)":
            n_before = self._n_groups
            items.append(self._repeated(self._atom(), n_before))
        return items[0] if len(items) == 1 else Sequence(tuple(items))

    def _repeated(self, node: Node, n_before: int) -> Node:
        start = self._at
        bounds = self._bounds()
        if bounds is None:
            return node
        written = self._source[start : self._at]
        if isinstance(node, Anchor | Look):
            raise PatternError(f"{written} repeats a place, not a text")
        self._take("?")  # how much is tried first does not change what matches
        if self._source[self._at : self._at + 1] in ("*", "+"):
            raise PatternError(f"{written}{self._source[self._at]} is no repetition of ECMA 262")
        least, most = bounds
        if most is not None and least > most:
            raise PatternError(f"{written} has its bounds the wrong way round")
        groups = frozenset(range(n_before + 1, self._n_groups + 1))
        return Repeat(node, least, most, groups)

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        if braces := self._match(_BRACES):
            least, comma, most = braces.groups()
            return int(least), (int(most) if most else None) if comma else int(least)
        if re.compile(r"\{,\d+\}").match(self._source, self._at):
            raise PatternError("{,N} is text in ECMA 262 and a repetition elsewhere; write {0,N}")
        return None

    def _atom(self) -> Node:
        char = self._next("itself")
        match char:
            case "(":
                return self._group()
            case "[":
                return self._cased(self._class())
            case "^" | "$":
                return Anchor(char)
            case ".":
                return Chars(complement(LINE_ENDS))
            case "\\":
                return self._escape()
            case "*" | "+" | "?":
                raise PatternError(f"{char} repeats nothing")
        return self._cased(_one(ord(char)))

    def _cased(self, chars: Chars) -> Chars:
        return replace(chars, any_case=True) if self._any_case else chars

    def _group(self) -> Node:
        self._at -= 1
        head = self._match(_GROUP)
        index = None
        if head is None:
            self._at += 1
            if self._take("?"):
                raise PatternError(f"(?{self._source[self._at : self._at + 3]} is not ECMA 262's")
        if head is None or head[4]:
            self._n_groups += 1
            index = self._n_groups
            if head and self._names.setdefault(head[4], index) != index:
                raise PatternError(f"it has two groups named {head[4]}")
        outside = self._any_case
        self._any_case = outside or bool(head and head[2])
        node = self._choice()
        self._any_case = outside
        if not self._take(")"):
            raise PatternError("a ( is not closed")
        if head and head[3]:
            return Look(node, behind="<" in head[3], negated="!" in head[3])
        return Group(node, index)

    def _escape(self) -> Node:
        if self._source[self._at : self._at + 1] in ("b", "B"):
            return Anchor(self._next("an escape"))
        if reference := self._match(_REFERENCE):
            group = reference[1] or int(reference[0])
            self._references.append(group)
            return Back(group)
        member = self._member()
        return self._cased(member if isinstance(member, Chars) else _one(member))

    def _member(self) -> Chars | int:
        """What comes after a backslash, inside a class or outside."""
        if code := self._match(_CODE):
            return self._code(int(code[1] or code[2] or code[3], 16))
        char = self._next("an escape")
        if char in "dws":
            return Chars(_CLASSES[char])
        if char in "DWS":
            return Chars(complement(_CLASSES[char.lower()]))
        if char in "pP":
            name = self._match(_PROPERTY)
            if name is None:
                raise PatternError(f"\\{char} needs a property in braces")
            return Chars((), (Property(name[1], negated=char == "P"),))
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char == "0" and not self._source[self._at : self._at + 1].isdigit():
            return 0
        if char == "c" and self._source[self._at : self._at + 1].isalpha():
            return ord(self._next("an escape")) % 32
        if char.isalnum():
            instead = f"; write {_OTHERS[char]}" if char in _OTHERS else ""
            raise PatternError(f"\\{char} is not ECMA 262's{instead}")
        return ord(char)

    def _code(self, code: int) -> int:
        r"""A code point, of which `\uD83D\uDE00` are two halves."""
        if code > LAST:
            raise PatternError(f"U+{code:X} is no character")
        if 0xD800 <= code <= 0xDBFF and (low := self._match(_LOW_HALF)):
            return 0x10000 + (code - 0xD800) * 0x400 + int(low[1], 16) - 0xDC00
        return code

    def _class(self) -> Chars:
        negated = self._take("^")
        ranges: list[tuple[int, int]] = []
        properties: list[Property] = []
        while not self._take("]"):
            low = self._class_member()
            if isinstance(low, Chars):
                ranges += low.ranges
                properties += low.properties
                continue
            high: Chars | int = low
            if self._source.startswith("-", self._at) and self._source[self._at + 1 :][:1] != "]":
                self._at += 1
                high = self._class_member()
            if isinstance(high, Chars):  # `[a-\d]`: the hyphen is one of the characters
                ranges += [(low, low), (0x2D, 0x2D), *high.ranges]
                properties += high.properties
            elif high < low:
                raise PatternError(f"the range {chr(low)}-{chr(high)} runs backwards")
            else:
                ranges.append((low, high))
        found = join_ranges(ranges)
        if properties:
            return Chars(found, tuple(properties), negated)
        return Chars(complement(found) if negated else found)

    def _class_member(self) -> Chars | int:
        char = self._next("a [ ]")
        if char != "\\":
            return ord(char)
        return 0x08 if self._take("b") else self._member()


def _one(code: int) -> Chars:
    ranges: Ranges = ((code, code),)
    return Chars(ranges)
