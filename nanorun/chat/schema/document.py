"""A JSON Schema as it came: what its references mean, and keywords in one spelling.

Draft 4's and OpenAPI 3.0's spellings (`items` as an array, `exclusiveMinimum: true`, `nullable`)
are read as what they mean; what is no schema is refused with its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

from nanorun.errors import UsageError

MOST_CHARS = 500_000
MOST_NESTED = 100
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_VALUES = frozenset({"const", "default", "enum", "example", "examples"})
"""Keywords that hold data, not schemas."""
_SUBJECTS = {
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains"),
    "object": (
        "properties", "required", "additionalProperties", "patternProperties", "propertyNames",
        "minProperties", "maxProperties",
    ),
}  # fmt: skip
"""What the keywords speak of; a schema without a type means these."""

Node = Any
"""A schema: an object, true or false."""


class Document:
    """A schema and the parts that it refers to.

    Raises:
        UsageError: If it is larger or nested deeper than anything people write.
    """

    def __init__(self, root: Node) -> None:
        self.root = root
        self._named: dict[str, Node] = {}
        stack = [(root, 0)]
        while stack:
            node, depth = stack.pop()
            if depth > MOST_NESTED:
                raise UsageError(f"the schema is nested more than {MOST_NESTED} deep")
            if isinstance(node, dict):
                self._note_names(node)
            stack += [(part, depth + 1) for part in _parts(node)]

    def _note_names(self, node: dict[str, Any]) -> None:
        for keyword in ("$anchor", "$dynamicAnchor", "$id", "id"):
            name = node.get(keyword)
            if isinstance(name, str):
                self._named[name.rstrip("#")] = node

    def find(self, reference: Any, path: str) -> Node:
        """What a `$ref` refers to.

        Raises:
            UsageError: If it is not in this schema.
        """
        if not isinstance(reference, str):
            raise wrong(path, "$ref", reference, "a string")
        base, _, fragment = reference.partition("#")
        if not base or base in self._named:
            node = self._named[base] if base else self.root
            fragment = unquote(fragment)
            if not fragment:
                return node
            if not fragment.startswith("/"):
                node = self._named.get(fragment)
            else:
                node = _follow(node, fragment)
            if isinstance(node, dict | bool):
                return node
        raise UsageError(
            f"{path}: $ref {reference[:80]!r} is not in the schema",
            facts=["every $ref must lead to a part of the same schema, for instance #/$defs/NAME"],
        )


def read_schema_text(text: str) -> Node:
    """The schema of a JSON text.

    Raises:
        UsageError: If it is not JSON, or too large.
    """
    if len(text) > MOST_CHARS:
        raise UsageError(f"a schema of {len(text)} characters; {MOST_CHARS} is the most")
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise UsageError(f"the schema is nested more than {MOST_NESTED} deep") from error
    except ValueError as error:
        raise UsageError(f"the schema is not JSON: {error}") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _parts(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        yield from (part for keyword, part in node.items() if keyword not in _VALUES)
    elif isinstance(node, list):
        yield from node


def _follow(node: Any, pointer: str) -> Any:
    for part in pointer[1:].split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(key)
        elif isinstance(node, list) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        else:
            return None
    return node


def wrong(path: str, keyword: str, value: Any, wanted: str) -> UsageError:
    """The error of a keyword whose value makes no sense."""
    shown = json.dumps(value, ensure_ascii=False, default=str)[:80]
    return UsageError(f"{path}: {keyword} is {shown}; it must be {wanted}")


def plain_keywords(node: dict[str, Any], path: str) -> dict[str, Any]:
    """A schema's own keywords, without null ones, in the spelling of draft 2020-12.

    `type` becomes a list, `const` an `enum`, and `pattern`, `format` and `multipleOf` lists, since
    several may hold at once.

    Raises:
        UsageError: If a keyword's value makes no sense.
    """
    found = {key: value for key, value in node.items() if value is not None or key == "const"}
    _modernize(found)
    for keyword, (check, wanted) in _FORMS.items():
        if keyword in found and not check(found[keyword]):
            raise wrong(path, keyword, found[keyword], wanted)
    if "type" in found:
        found["type"] = _types(found["type"], path)
    if "const" in found:
        constant = [found.pop("const")]
        found["enum"] = [v for v in constant if "enum" not in found or v in found["enum"]]
    if found.get("contentEncoding") in ("base64", "base64url"):
        found.setdefault("format", found["contentEncoding"])
    for keyword in ("pattern", "format", "multipleOf", "propertyNames"):
        if keyword in found:
            found[keyword] = [found[keyword]]
    return found


def _modernize(found: dict[str, Any]) -> None:
    if isinstance(found.get("items"), list):
        found["prefixItems"] = found.pop("items")
        if "additionalItems" in found:
            found["items"] = found.pop("additionalItems")
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(found.get(exclusive), bool):
            is_exclusive = found.pop(exclusive)
            if is_exclusive and bound in found:
                found[exclusive] = found.pop(bound)
    if isinstance(found.get("required"), bool):  # draft 3 marked each property
        del found["required"]


def _types(value: Any, path: str) -> list[str]:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name in TYPES for name in names):
        raise wrong(path, "type", value, f"one of {', '.join(TYPES)}, or a list of them")
    return [name for name in names if name != "integer" or "number" not in names]


def spoken_of(keywords: dict[str, Any]) -> list[str]:
    """The types that the keywords are about; empty if they say nothing of any."""
    return [kind for kind, names in _SUBJECTS.items() if any(name in keywords for name in names)]


def _is_node(value: Any) -> bool:
    return isinstance(value, dict | bool)


def _is_count(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and value >= 0
        and (value == int(value))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_nodes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_node, value))


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_node, value.values()))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_Form = tuple[Callable[[Any], bool], str]
_NODE: _Form = (_is_node, "a schema")
_NODES: _Form = (_is_nodes, "a list of schemas")
_MAP: _Form = (_is_map, "an object of schemas")
_COUNT: _Form = (_is_count, "a count")
_NUMBER: _Form = (_is_number, "a number")
_TEXT: _Form = (_is_text, "a string")
_FORMS: dict[str, _Form] = {
    "additionalProperties": _NODE, "items": _NODE, "propertyNames": _NODE, "not": _NODE,
    "prefixItems": _NODES, "allOf": _NODES, "anyOf": _NODES, "oneOf": _NODES,
    "properties": _MAP, "patternProperties": _MAP,
    "minItems": _COUNT, "maxItems": _COUNT, "minLength": _COUNT, "maxLength": _COUNT,
    "minProperties": _COUNT, "maxProperties": _COUNT,
    "minimum": _NUMBER, "maximum": _NUMBER, "exclusiveMinimum": _NUMBER,
    "exclusiveMaximum": _NUMBER,
    "multipleOf": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "pattern": _TEXT, "format": _TEXT,
    "required": (_is_names, "a list of names"),
    "enum": (lambda value: isinstance(value, list), "a list of values"),
}  # fmt: skip
