"""Judges an answer by its schema as it came, with what no grammar could hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Context, Decimal, DecimalException, localcontext
from functools import cache
from typing import Any

from nanorun.chat.schema.document import Node
from nanorun.chat.schema.formats import ALIASES, INTEGERS, STRINGS, format_regex
from nanorun.chat.schema.pattern.matching import Undecided, is_found
from nanorun.chat.schema.pattern.parsing import PatternError, parse_pattern

_MOST_SHOWN = 3
_MOST_DIGITS = 400
"""Of a number that is still worked out; a double ends at 308."""
_OLD_ITEMS = "https://json-schema.org/draft/2019-09/schema"


def check_answer(text: str, schema: Node) -> list[str]:
    """What is wrong with an answer, a line each, the first few; empty if it fits.

    The schema is read by the draft that its `$schema` names, else by 2020-12, or by 2019-09 if it
    writes `items` as an array; OpenAPI 3.0's `nullable` and boolean bounds are understood.
    Numbers are compared digit by digit.
    """
    try:
        value = json.loads(text, parse_float=_number, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        return [f"it is not JSON: {error}"]
    return check_value(value, schema)


def check_value(value: Any, schema: Node) -> list[str]:
    """The same of a value."""
    from jsonschema.exceptions import ValidationError
    from referencing.exceptions import Unresolvable

    try:
        with localcontext(Context(prec=2 * _MOST_DIGITS)):
            validator = _validator(schema)
            errors: Iterator[ValidationError] = validator.iter_errors(value)
            found = [f"{_place(error)}: {error.message[:200]}" for error in errors]
    except (Undecided, Unresolvable, RecursionError, DecimalException) as error:
        return [f"it cannot be checked: {error}"]
    return found[:_MOST_SHOWN]


def _number(text: str) -> int | Decimal:
    value = Decimal(text)
    is_whole = value.adjusted() < _MOST_DIGITS and value == value.to_integral_value()
    return int(value) if is_whole else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the property {twice!r} comes twice")
    return found


def _place(error: Any) -> str:
    return "$" + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path)


def _validator(schema: Node) -> Any:
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    named = schema if isinstance(schema, dict) and "$schema" in schema else {}
    if not named and '"items": [' in json.dumps(schema):
        named = {"$schema": _OLD_ITEMS}
    draft = _with_our_keywords(validator_for(named, default=Draft202012Validator))
    is_old = draft.ID_OF({"id": "x"}) == "x"  # drafts 3 and 4 have boolean bounds themselves
    # Without a registry of its own it would fetch references from the network.
    return draft(_readable(schema, is_old=is_old), registry=Registry(), format_checker=_formats())


@cache
def _with_our_keywords(draft: Any) -> Any:
    """A draft's validator with ECMA 262's patterns in place of Python's."""
    from jsonschema import ValidationError
    from jsonschema.validators import extend

    def pattern(_: Any, wanted: str, value: Any, __: Any) -> Iterator[ValidationError]:
        if isinstance(value, str) and not _is_found(wanted, value):
            yield ValidationError(f"{value!r} does not match {wanted!r}")

    def pattern_properties(
        validator: Any, patterns: dict[str, Any], value: Any, _: Any
    ) -> Iterator[ValidationError]:
        for wanted, node in patterns.items() if isinstance(value, dict) else ():
            for name in [name for name in value if _is_found(wanted, name)]:
                yield from validator.descend(value[name], node, path=name, schema_path=wanted)

    def additional_properties(
        validator: Any, node: Any, value: Any, schema: Any
    ) -> Iterator[ValidationError]:
        patterns = schema.get("patternProperties", {})
        for name in value if isinstance(value, dict) else ():
            is_listed = name in schema.get("properties", {})
            if not is_listed and not any(_is_found(pattern, name) for pattern in patterns):
                yield from validator.descend(value[name], node, path=name)

    return extend(draft, {
        "pattern": pattern,
        "patternProperties": pattern_properties,
        "additionalProperties": additional_properties,
    })  # fmt: skip


def _is_found(pattern: str, text: str) -> bool:
    try:
        return is_found(parse_pattern(pattern), text)
    except PatternError as error:
        raise Undecided(str(error)) from error


@cache
def _formats() -> Any:
    """Checks of every format that the grammar knows."""
    from jsonschema import FormatChecker

    checker = FormatChecker(formats=())
    for name in (*STRINGS, *ALIASES):
        expression = parse_pattern(f"^(?:{format_regex(name)})$")
        checker.checks(name)(
            lambda value, found=expression: not isinstance(value, str) or is_found(found, value)
        )
    for name, (least, most) in INTEGERS.items():
        checker.checks(name)(
            lambda value, low=least, high=most: not isinstance(value, int) or low <= value <= high
        )
    return checker


def _readable(node: Any, *, is_old: bool) -> Any:
    """The schema with OpenAPI 3.0's words in JSON Schema's, at the same places."""
    if isinstance(node, list):
        return [_readable(part, is_old=is_old) for part in node]
    if isinstance(node, float):
        return Decimal(str(node))  # as it was written; answers are Decimals too
    if not isinstance(node, dict):
        return node
    found = {
        keyword: part if keyword in ("const", "enum", "default") else _readable(part, is_old=is_old)
        for keyword, part in node.items()
        if part is not None or keyword == "const"
    }
    if not is_old:
        for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            if isinstance(found.get(exclusive), bool) and found.pop(exclusive) and bound in found:
                found[exclusive] = found.pop(bound)
    if isinstance(found.get("required"), bool):
        del found["required"]
    if found.pop("nullable", None) is True:
        definitions = {k: found.pop(k) for k in ("$defs", "definitions") if k in found}
        return {"anyOf": [{"type": "null"}, found], **definitions}
    return found
