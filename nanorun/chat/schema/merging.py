"""Both of two schemas, as one: what `allOf` and a `$ref` with neighbours mean.

Works on keywords as `plain_keywords` spells them. Schemas below them are put together as an
`allOf` and merged when their turn comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from nanorun.chat.schema.document import Node
from nanorun.chat.schema.pattern.matching import Undecided, is_found
from nanorun.chat.schema.pattern.parsing import PatternError, parse_pattern

Keywords = dict[str, Any]


def merge(first: Keywords, second: Keywords) -> Keywords:
    """Keywords that say what both say."""
    merged = dict(first)
    for keyword, value in second.items():
        rule = _RULES.get(keyword)
        if keyword not in first:
            merged[keyword] = value
        elif rule is not None:
            merged[keyword] = rule(first[keyword], value)
    return {**merged, **_properties(first, second), **_prefix_items(first, second)}


def both(first: Node, second: Node) -> Node:
    """A schema that says what both say."""
    if first is False or second is False:
        return False
    if first is True or first == second or first == {}:
        return second
    return first if second is True or second == {} else {"allOf": [first, second]}


def json_equal(first: Any, second: Any) -> bool:
    """Whether two values are the same in JSON, where true is not 1."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(json_equal, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(json_equal(first[k], second[k]) for k in first)
    return bool(first == second)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is found in a property's name; no if that cannot be told."""
    try:
        return is_found(parse_pattern(pattern), name)
    except (PatternError, Undecided):
        return False


def property_schema(keywords: Keywords, name: str) -> Node:
    """What a schema says of a property."""
    if name in keywords.get("properties", {}):
        return keywords["properties"][name]
    found: Node = True
    patterns = keywords.get("patternProperties", {})
    matching = [pattern for pattern in patterns if matches(pattern, name)]
    for pattern in matching:
        found = both(found, patterns[pattern])
    return found if matching else keywords.get("additionalProperties", True)


def _properties(first: Keywords, second: Keywords) -> Keywords:
    merged: Keywords = {}
    names = [*first.get("properties", {}), *second.get("properties", {})]
    if names:
        merged["properties"] = {
            name: both(property_schema(first, name), property_schema(second, name))
            for name in dict.fromkeys(names)
        }
    patterns = [*first.get("patternProperties", {}), *second.get("patternProperties", {})]
    if patterns:
        merged["patternProperties"] = {
            pattern: both(_pattern_schema(first, pattern), _pattern_schema(second, pattern))
            for pattern in dict.fromkeys(patterns)
        }
    return merged


def _pattern_schema(keywords: Keywords, pattern: str) -> Node:
    patterns = keywords.get("patternProperties", {})
    return patterns.get(pattern, keywords.get("additionalProperties", True))


def _prefix_items(first: Keywords, second: Keywords) -> Keywords:
    one, other = first.get("prefixItems", []), second.get("prefixItems", [])
    if not one and not other:
        return {}
    n_items = max(len(one), len(other))
    one = [*one, *[first.get("items", True)] * (n_items - len(one))]
    other = [*other, *[second.get("items", True)] * (n_items - len(other))]
    return {"prefixItems": list(map(both, one, other))}


def _types(first: list[str], second: list[str]) -> list[str]:
    return [
        name
        for name in dict.fromkeys([*first, *second])
        if all(
            name in names or (name == "integer" and "number" in names) for names in (first, second)
        )
    ]


def _values(first: list[Any], second: list[Any]) -> list[Any]:
    return [value for value in first if any(json_equal(value, other) for other in second)]


def _joined(first: list[Any], second: list[Any]) -> list[Any]:
    return [*first, *(value for value in second if value not in first)]


def _factors(first: list[float], second: list[float]) -> list[Any]:
    factors = _joined(first, second)
    if all(isinstance(factor, int) for factor in factors):
        return [math.lcm(*map(int, factors))]
    return factors


_RULES: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"), max),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"), min),
    **dict.fromkeys(("pattern", "format", "required", "propertyNames"), _joined),
    **dict.fromkeys(("items", "additionalProperties"), both),
    "multipleOf": _factors,
    "type": _types,
    "enum": _values,
    "uniqueItems": lambda first, second: first or second,
}
