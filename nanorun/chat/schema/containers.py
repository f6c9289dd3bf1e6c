"""What llguidance can hold of objects and arrays; the rest goes to the check afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanorun.chat.schema.document import Node, plain_keywords
from nanorun.chat.schema.merging import property_schema
from nanorun.chat.schema.scalars import Drop, hold_string, translate_pattern

Visit = Callable[[Node, str], Any]
"""Holds a schema further down, given its place."""

_MOST_ITEMS = 1_000
"""llguidance spells out every one of them."""


def hold_array(keywords: dict[str, Any], path: str, visit: Visit, drop: Drop) -> dict[str, Any]:
    """An array. No more than 1,000 items may come, whatever `maxItems` says beyond that."""
    held: dict[str, Any] = {"type": "array"}
    first = keywords.get("prefixItems", [])
    if first:
        held["prefixItems"] = [visit(item, f"{path}[{i}]") for i, item in enumerate(first)]
    if "items" in keywords:
        held["items"] = visit(keywords["items"], f"{path}[]")
    least, most = int(keywords.get("minItems", 0)), keywords.get("maxItems")
    if keywords.get("uniqueItems"):
        most = _most_different(held.get("items"), most) if not first else most
        if most is None or most > 1:
            drop("uniqueItems", "the grammar cannot tell which items came before")
    if least > _MOST_ITEMS:
        drop("minItems", f"the grammar counts to {_MOST_ITEMS}")
    elif least:
        held["minItems"] = least
    if most is not None and least <= _MOST_ITEMS:
        held["maxItems"] = min(int(most), _MOST_ITEMS)
    return held


def _most_different(items: Any, most: int | None) -> int | None:
    """How many items can differ, if they are one of a few values."""
    values = items.get("enum") if isinstance(items, dict) else None
    if not isinstance(values, list):
        return most
    return len(values) if most is None else min(int(most), len(values))


def hold_object(keywords: dict[str, Any], path: str, visit: Visit, drop: Drop) -> dict[str, Any]:
    """An object, closed after the properties it lists unless it says itself that more may come."""
    keywords = _with_names(keywords, drop)
    required = list(dict.fromkeys(keywords.get("required", [])))
    names = dict.fromkeys([*keywords.get("properties", {}), *required])
    held: dict[str, Any] = {
        "type": "object",
        "properties": {
            name: visit(property_schema(keywords, name), f"{path}.{name}") for name in names
        },
        "required": required,
    }
    patterns = _hold_patterns(keywords, path, visit, drop)
    if patterns:
        held["patternProperties"] = patterns
    if "additionalProperties" in keywords:
        held["additionalProperties"] = visit(keywords["additionalProperties"], f"{path}.*")
    elif names or patterns:
        held["additionalProperties"] = False
    return {**held, **_count(keywords, held, drop)}


def _with_names(keywords: dict[str, Any], drop: Drop) -> dict[str, Any]:
    """The keywords with `propertyNames` said in other ones, where they can say it."""
    rules = [rule for rule in keywords.get("propertyNames", ()) if rule not in (True, {})]
    rules = [rule for rule in rules if rule != {"type": "string"}]
    if not rules:
        return keywords
    rule = plain_keywords(rules[0], "property names") if isinstance(rules[0], dict) else {}
    values, others = rule.get("enum"), keywords.get("additionalProperties", True)
    taken = keywords.keys() & {"properties", "patternProperties"}
    names: dict[str, Any] = dict(keywords.get("properties", {}))
    if len(rules) == 1 and values and "patternProperties" not in taken:
        allowed = [name for name in values if isinstance(name, str)]
        listed = {name: names.get(name, others) for name in allowed}
        return {**keywords, "properties": listed, "additionalProperties": False}
    pattern = _name_pattern(rule)
    if len(rules) == 1 and pattern and not taken:
        return {**keywords, "patternProperties": {pattern: others}, "additionalProperties": False}
    drop("propertyNames", "the grammar cannot hold names to it beside the properties listed")
    return keywords


def _name_pattern(rule: dict[str, Any]) -> str | None:
    """One pattern that says all of what names must be, if one does."""
    if rule.keys() - {"type", "pattern", "minLength", "maxLength", "format"}:
        return None
    if rule.keys() & {"minLength", "maxLength"}:
        if rule.keys() & {"pattern", "format"}:
            return None
        return f"^[^]{{{int(rule.get('minLength', 0))},{rule.get('maxLength', '')}}}$"
    held = hold_string(rule, "property names", lambda *_: None)
    patterns = rule.get("pattern", [])
    return patterns[0] if len(patterns) == 1 and "allOf" not in held else None


def _hold_patterns(keywords: dict[str, Any], path: str, visit: Visit, drop: Drop) -> dict[str, Any]:
    """`patternProperties`, as one: llguidance takes several only if they exclude each other."""
    regexes, held = [], []
    for pattern, node in keywords.get("patternProperties", {}).items():
        found = translate_pattern(pattern, path)
        if found.left_out:
            drop("patternProperties", f"the grammar cannot hold {found.left_out}: {pattern}")
        if found.regex is not None:
            regexes.append(found.regex.removeprefix("^").removesuffix("$"))
            held.append(visit(node, f"{path}.*"))
    if not regexes:
        return {}
    different = [value for i, value in enumerate(held) if value not in held[:i]]
    if len(different) > 1:
        drop("patternProperties", "the grammar takes any of their schemas for any of their names")
    schema = different[0] if len(different) == 1 else {"anyOf": different}
    return {f"^(?:{'|'.join(regexes)})$": schema}


def _count(keywords: dict[str, Any], held: dict[str, Any], drop: Drop) -> dict[str, Any]:
    """`minProperties` and `maxProperties`, which llguidance counts only among required ones."""
    least = int(keywords.get("minProperties", 0))
    most = keywords.get("maxProperties")
    n_required = len(held["required"])
    optional = [
        name
        for name, schema in held["properties"].items()
        if name not in held["required"] and schema is not False
    ]
    is_closed = held.get("additionalProperties") is False and "patternProperties" not in held
    if is_closed and most is not None and most >= len(held["properties"]):
        most = None
    if least <= n_required and most is None:
        return {}
    one_of_many = least - n_required <= 1 and most in (None, n_required + 1)
    if (optional and not (is_closed and one_of_many)) or max(least, most or 0) > _MOST_ITEMS:
        drop("minProperties" if least else "maxProperties", "the grammar cannot count properties")
        return {}
    counts = {"minProperties": least, "maxProperties": None if most is None else int(most)}
    return {name: count for name, count in counts.items() if count}
