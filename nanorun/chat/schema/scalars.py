"""What llguidance can hold of numbers and strings; the rest goes to the check afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from nanorun.chat.schema.formats import ALIASES, ANNOTATIONS, INTEGERS, format_regex
from nanorun.chat.schema.pattern.parsing import PatternError, parse_pattern
from nanorun.chat.schema.pattern.translating import Translation, translate
from nanorun.errors import UsageError

Drop = Callable[[str, str], None]
"""Takes note of a keyword that is left to the check, and why."""

_MOST = 9_223_372_036_854_774_784
"""The largest double below 2**63; llguidance keeps bounds as doubles and digits of 64 bits."""
_MOST_FACTOR = 10_000
"""A factor of n digits is an automaton of as many states as its value: 100,003 takes a second."""
_EXACT = 2**53


def hold_integer(keywords: dict[str, Any], drop: Drop) -> dict[str, Any]:
    """An integer: whole bounds, narrowed to numbers that a double holds exactly."""
    low, high = _bounds(keywords)
    for name in keywords.get("format", ()):
        least, most = INTEGERS.get(name, (None, None))
        low = low if least is None else max(low, least)
        high = high if most is None else min(high, most)
    held: dict[str, Any] = {"type": "integer", **_multiple(keywords, drop)}
    if low > _MOST or high < -_MOST:
        drop("minimum" if low > _MOST else "maximum", "the grammar counts in 64 bits")
        return held
    low = low if low == -math.inf else max(low, -_MOST)
    high = high if high == math.inf else min(high, _MOST)
    if low != -math.inf:
        held["minimum"] = _double_above(math.ceil(low))
    if high != math.inf:
        held["maximum"] = -_double_above(-math.floor(high))
    return held


def _bounds(keywords: dict[str, Any]) -> tuple[float, float]:
    """The least and the largest integer, in Python's integers where they are finite."""
    low: float = keywords.get("minimum", -math.inf)
    high: float = keywords.get("maximum", math.inf)
    if "exclusiveMinimum" in keywords:
        low = max(low, math.floor(keywords["exclusiveMinimum"]) + 1)
    if "exclusiveMaximum" in keywords:
        high = min(high, math.ceil(keywords["exclusiveMaximum"]) - 1)
    return low, high


def _double_above(bound: int) -> int:
    """The smallest integer from `bound` on that a double holds."""
    nearest = float(bound)
    return int(nearest if nearest >= bound else math.nextafter(nearest, math.inf))


def hold_number(keywords: dict[str, Any], drop: Drop) -> dict[str, Any]:
    """A number; its bounds are doubles to llguidance as they are to whoever wrote them."""
    held: dict[str, Any] = {"type": "number", **_multiple(keywords, drop)}
    for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        if keyword in keywords:
            held[keyword] = keywords[keyword] or 0  # not -0.0, which llguidance writes as such
    return held


def _multiple(keywords: dict[str, Any], drop: Drop) -> dict[str, Any]:
    factors = keywords.get("multipleOf", [])
    if not factors:
        return {}
    digits = Decimal(str(factors[0])).normalize().as_tuple()
    factor, exponent = int("".join(map(str, digits.digits))), int(digits.exponent)
    if len(factors) > 1 or factor > _MOST_FACTOR or not -9 <= exponent <= 6:
        shown = " and ".join(str(factor) for factor in factors)
        drop("multipleOf", f"multiples of {shown} are more than the grammar can count")
        return {}
    return {"multipleOf": factors[0]}


def can_hold_value(value: Any) -> bool:
    """Whether llguidance keeps every digit of a constant; it reads numbers as doubles."""
    match value:
        case bool():
            return True
        case int():
            return abs(value) <= _EXACT or (abs(value) <= _MOST and int(float(value)) == value)
        case list():
            return all(map(can_hold_value, value))
        case dict():
            return all(map(can_hold_value, value.values()))
    return True


def hold_string(keywords: dict[str, Any], path: str, drop: Drop) -> dict[str, Any]:
    """A string: its length, and every expression that it must match."""
    held: dict[str, Any] = {"type": "string"}
    for keyword in ("minLength", "maxLength"):
        if keyword in keywords:
            held[keyword] = int(keywords[keyword])
    regexes = []
    for pattern in keywords.get("pattern", ()):
        found = translate_pattern(pattern, path)
        if found.left_out:
            drop("pattern", f"the grammar cannot hold {found.left_out}: {pattern}")
        regexes += [found.regex] if found.regex else []
    for name in keywords.get("format", ()):
        regex = format_regex(name)
        if regex is not None:
            regexes.append(f"^(?:{regex})$")
        elif ALIASES.get(name, name) not in ANNOTATIONS | INTEGERS.keys():
            drop("format", f"{name!r} is not known, so it is not checked either")
    if regexes:
        held["pattern"] = regexes[0]
    if len(regexes) > 1:
        held["allOf"] = [{"type": "string", "pattern": regex} for regex in regexes[1:]]
    return held


def translate_pattern(pattern: str, path: str) -> Translation:
    """A pattern for the grammar.

    Raises:
        UsageError: If it has no meaning in ECMA 262.
    """
    try:
        return translate(parse_pattern(pattern))
    except PatternError as error:
        raise UsageError(
            f"{path}: the pattern {pattern[:80]!r} cannot be used: {error}",
            facts=["JSON Schema's patterns are ECMA 262's regular expressions, as in JavaScript"],
        ) from error
