"""Turns a JSON Schema into one that llguidance holds a reply to, and says what is left over.

llguidance refuses what it does not know, so it is given only what it does: references resolved,
`allOf` merged, every keyword in draft 2020-12's spelling. What is left out makes the grammar
wider, never narrower, and the check afterwards (`checking.py`) judges the answer by the schema as
it came. Three things are narrower than the schema: properties come in its order, an object is
closed after the properties it lists unless `additionalProperties` says otherwise, and a schema
without a type means the type that its keywords speak of.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from functools import reduce
from typing import Any

from nanorun.chat.schema.containers import hold_array, hold_object
from nanorun.chat.schema.document import (
    MOST_NESTED,
    TYPES,
    Document,
    Node,
    plain_keywords,
    spoken_of,
)
from nanorun.chat.schema.merging import Keywords, json_equal, merge
from nanorun.chat.schema.scalars import can_hold_value, hold_integer, hold_number, hold_string
from nanorun.errors import UsageError

_MOST_COMBINED = 64
_MOST_PARTS = 20_000
_WHITESPACE = {"whitespace_pattern": r"[ ]{1,2}|\r?\n[ \t]{0,24}"}
"""Blanks between tokens; llguidance's own are unbounded, and a model may write them for ever."""
_LEFT_TO_CHECK = {
    "not": "the grammar cannot exclude",
    "if": "the grammar cannot branch",
    "contains": "the grammar cannot look for an item",
    "dependentRequired": "the grammar cannot make one property ask for another",
    "dependentSchemas": "the grammar cannot make one property ask for another",
    "dependencies": "the grammar cannot make one property ask for another",
    "unevaluatedItems": "the grammar cannot tell which items were evaluated",
    "unevaluatedProperties": "the grammar cannot tell which properties were evaluated",
}
_SCHEMAS = ("$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "nullable")
_SELF_EVIDENT = frozenset({"type", "enum"})


@dataclass(frozen=True, slots=True)
class Dropped:
    """Something that the grammar leaves to the check afterwards."""

    path: str
    keyword: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.keyword} is checked afterwards: {self.reason}"


@dataclass(frozen=True, slots=True)
class Held:
    """A schema for llguidance."""

    schema: dict[str, Any] | bool
    dropped: tuple[Dropped, ...] = ()

    @property
    def choices(self) -> list[Any] | None:
        """The values of a schema that only lists some."""
        return self._top.get("enum")

    def takes(self, kind: str) -> bool:
        """Whether a value of this type, `string` for example, may fit."""
        options = self._top.get("anyOf", [self._top])
        return any(self._may_be(kind, option) for option in options)

    @property
    def _top(self) -> dict[str, Any]:
        return self._resolved(self.schema)

    def _resolved(self, schema: Any) -> dict[str, Any]:
        while isinstance(schema, dict) and "$ref" in schema:
            assert isinstance(self.schema, dict)
            schema = self.schema["$defs"][schema["$ref"].rpartition("/")[2]]
        return schema if isinstance(schema, dict) else {}

    def _may_be(self, kind: str, schema: Any) -> bool:
        schema = self._resolved(schema)
        if "anyOf" in schema:
            return any(isinstance(o, dict) and o.get("type") == kind for o in schema["anyOf"])
        if "enum" in schema:
            return any(_has_type(value, (kind,)) for value in schema["enum"])
        return "type" not in schema or schema["type"] == kind


def hold(root: Node, path: str = "$") -> Held:
    """The whole of a schema.

    Args:
        root: A JSON Schema.
        path: How messages name its place.

    Raises:
        UsageError: If it has no meaning, or is too large.
    """
    return Holder(root).hold(root, path)


class Holder:
    """Holds parts of one document.

    Args:
        root: What references start from.
    """

    def __init__(self, root: Node) -> None:
        self._document = Document(root)
        self._dropped: dict[Dropped, None] = {}
        self._names: dict[str, str] = {}
        self._definitions: dict[str, Any] = {}
        self._n_parts = 0
        self._depth = 0

    def hold(self, node: Node, path: str) -> Held:
        """One schema of the document, with the definitions that it needs.

        Raises:
            UsageError: If it has no meaning, or is too large.
        """
        self._dropped, self._names, self._definitions = {}, {}, {}
        schema = self._visit(node, path)
        if schema is False:
            raise UsageError(f"{path}: no value fits the schema")
        if isinstance(schema, dict):
            schema = {"x-guidance": _WHITESPACE, **schema}
            if self._definitions:
                schema["$defs"] = self._definitions
        return Held(schema, tuple(self._dropped))

    def parameters(self, path: str) -> tuple[dict[str, Node], tuple[str, ...]]:
        """The properties of the root, which is a tool's parameters, and the required ones.

        Those of alternatives are among them, for any alternative.
        """
        base, alternatives = self._conjunction(self._document.root, path)
        properties = dict(base.get("properties", {}))
        for option in itertools.chain.from_iterable(alternatives):
            for name, node in self._conjunction(option, path)[0].get("properties", {}).items():
                properties.setdefault(name, node)
        required = tuple(base.get("required", ()))
        return {**properties, **{n: True for n in required if n not in properties}}, required

    def additional(self, path: str) -> Held | None:
        """What the root asks of properties that it does not list; None if there may be none."""
        base, _ = self._conjunction(self._document.root, path)
        if "patternProperties" in base:
            return Held({})
        schema = base.get("additionalProperties", False)
        return None if schema is False else self.hold(schema, f"{path}.*")

    def _visit(self, node: Node, path: str) -> Any:
        """A schema as llguidance takes it; one that others refer to becomes a definition."""
        if isinstance(node, bool):
            return {} if node else False
        self._n_parts += 1
        if self._n_parts > _MOST_PARTS:
            raise UsageError(f"{path}: the schema has more than {_MOST_PARTS} parts")
        if self._depth > MOST_NESTED:
            raise UsageError(f"{path[:80]}: the schema is nested more than {MOST_NESTED} deep")
        self._depth += 1
        held = self._hold(node, path)
        self._depth -= 1
        return held

    def _hold(self, node: dict[str, Any], path: str) -> Any:
        if not any(node.get(keyword) is not None for keyword in _SCHEMAS):
            return self._emit(self._plain(node, path), path)
        key = json.dumps(node)
        if key not in self._names:
            name = self._names[key] = f"d{len(self._names)}"
            self._definitions[name] = self._combine(node, path)
        return self._reference(self._names[key])

    def _reference(self, name: str) -> Any:
        """A definition's content where it is short, or else where it stands."""
        if name not in self._definitions:  # being made: it contains itself
            return {"$ref": f"#/$defs/{name}"}
        content = self._definitions[name]
        if content is False or content.keys() <= _SELF_EVIDENT or "$ref" in content:
            return content
        return {"$ref": f"#/$defs/{name}"}

    def _combine(self, node: dict[str, Any], path: str) -> Any:
        base, alternatives = self._conjunction(node, path)
        alternatives = self._affordable(alternatives, path)
        if not alternatives:
            return self._emit(base, path)
        if len(alternatives) == 1 and not self._says_something(base):
            options = alternatives[0]
        else:
            rest = [_respell(base)] if self._says_something(base) else []
            options = [{"allOf": [*rest, *choice]} for choice in itertools.product(*alternatives)]
        held = [self._visit(option, path) for option in options]
        possible = [option for option in held if option is not False]
        if not possible:
            return False
        return possible[0] if len(possible) == 1 else {"anyOf": possible}

    def _affordable(self, alternatives: list[list[Node]], path: str) -> list[list[Node]]:
        kept: list[list[Node]] = []
        n_combined = 1
        for options in alternatives:
            if kept and n_combined * len(options) > _MOST_COMBINED:
                self._drop(path, "anyOf", "it stands beside too many other alternatives")
                continue
            n_combined *= len(options)
            kept.append(options)
        return kept

    def _says_something(self, base: Keywords) -> bool:
        return bool(base.keys() & {"type", "enum"}) or bool(spoken_of(base))

    def _conjunction(self, node: Node, path: str) -> tuple[Keywords, list[list[Node]]]:
        """All that must hold at once, and the alternatives of which one must."""
        parts: list[Keywords] = []
        alternatives: list[list[Node]] = []
        waiting = [node]
        seen: dict[int, Node] = {}  # with the nodes, so that no other gets their ids
        while waiting:
            node = waiting.pop(0)
            if isinstance(node, bool):
                parts += [] if node else [{"enum": []}]
                continue
            if id(node) in seen:
                continue
            seen[id(node)] = node
            if node.get("nullable") is True:
                bare = {key: value for key, value in node.items() if key != "nullable"}
                alternatives.append([_without_null_in_enum(bare), {"type": "null"}])
                continue
            keywords = self._plain(node, path)
            for keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
                if keyword in keywords:
                    waiting.append(self._document.find(keywords.pop(keyword), path))
            waiting += keywords.pop("allOf", [])
            alternatives += self._alternatives(keywords, path)
            parts.append(keywords)
        return reduce(merge, parts, {}), alternatives

    def _alternatives(self, keywords: Keywords, path: str) -> list[list[Node]]:
        found = []
        if "anyOf" in keywords:
            found.append(keywords.pop("anyOf"))
        if "oneOf" in keywords:
            options = keywords.pop("oneOf")
            if not self._exclude_each_other(options, path):
                self._drop(path, "oneOf", "more than one of the alternatives may fit")
            found.append(options)
        return found

    def _exclude_each_other(self, options: list[Node], path: str) -> bool:
        if len(options) > 100:
            return False
        bases = [self._conjunction(option, path)[0] for option in options]
        return all(_are_disjoint(a, b) for a, b in itertools.combinations(bases, 2))

    def _plain(self, node: dict[str, Any], path: str) -> Keywords:
        """The keywords of one schema; those that no grammar holds are noted."""
        keywords = plain_keywords(node, path)
        if keywords.get("not") in (True, {}):
            return {"enum": []}
        for keyword in keywords.keys() & _LEFT_TO_CHECK.keys():
            self._drop(path, keyword, _LEFT_TO_CHECK[keyword])
        return keywords

    def _drop(self, path: str, keyword: str, reason: str) -> None:
        self._dropped[Dropped(path, keyword, reason)] = None

    def _emit(self, keywords: Keywords, path: str) -> Any:
        """Plain keywords, one schema for each type."""
        if "enum" in keywords:
            return self._emit_values(keywords, path)
        types = keywords.get("type") or spoken_of(keywords)
        if "type" in keywords and not types:
            return False
        options = [self._emit_type(kind, keywords, path) for kind in types]
        if len(options) == 1:
            return options[0]
        return {"anyOf": options} if options else {}

    def _emit_values(self, keywords: Keywords, path: str) -> Any:
        types = keywords.get("type", TYPES)
        values = [value for value in keywords["enum"] if _has_type(value, types)]
        if not values:
            return False
        exact = [_whole(value) for value in values if can_hold_value(value)]
        if not exact:
            self._drop(path, "enum", "the grammar keeps 53 bits of an integer")
            return {"type": "integer"} if isinstance(values[0], int) else {}
        if len(exact) < len(values):
            self._drop(path, "enum", "values of more than 53 bits cannot be given")
        return {"enum": exact}

    def _emit_type(self, kind: str, keywords: Keywords, path: str) -> dict[str, Any]:
        def drop(keyword: str, reason: str) -> None:
            self._drop(path, keyword, reason)

        match kind:
            case "string":
                return hold_string(keywords, path, drop)
            case "integer":
                return hold_integer(keywords, drop)
            case "number":
                return hold_number(keywords, drop)
            case "array":
                return hold_array(keywords, path, self._visit, drop)
            case "object":
                return hold_object(keywords, path, self._visit, drop)
        return {"type": kind}


def _respell(base: Keywords) -> Node:
    """Merged keywords as a schema again, where each of several values becomes an `allOf`."""
    node = {k: v for k, v in base.items() if k not in ("pattern", "format", "multipleOf")}
    names = node.pop("propertyNames", [])
    further = [{"propertyNames": rule} for rule in names]
    for keyword in ("pattern", "format", "multipleOf"):
        further += [{keyword: value} for value in base.get(keyword, ())]
    return {**node, "allOf": further} if further else node


def _without_null_in_enum(node: dict[str, Any]) -> Node:
    """OpenAPI 3.0 has null among the values of a nullable `enum`; the other alternative says it."""
    if isinstance(node.get("enum"), list):
        return {**node, "enum": [value for value in node["enum"] if value is not None]}
    return node


def _has_type(value: Any, types: Any) -> bool:
    match value:
        case None:
            return "null" in types
        case bool():
            return "boolean" in types
        case int() | float():
            return "number" in types or ("integer" in types and value == int(value))
        case str():
            return "string" in types
        case list():
            return "array" in types
    return "object" in types


def _whole(value: Any) -> Any:
    """3.0 is 3, and -0.0 is 0, in JSON; llguidance would write the sign."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _are_disjoint(first: Keywords, second: Keywords) -> bool:
    """Whether no value can fit both, as types or a constant of a common property show."""
    if "enum" in first and "enum" in second:
        return not any(json_equal(a, b) for a in first["enum"] for b in second["enum"])
    if "type" in first and "type" in second and not merge(
        {"type": first["type"]}, {"type": second["type"]}
    )["type"]:  # fmt: skip
        return True
    shared = set(first.get("required", ())) & set(second.get("required", ()))
    return any(
        _values_differ(first.get("properties", {}).get(n), second.get("properties", {}).get(n))
        for n in shared
    )


def _values_differ(first: Any, second: Any) -> bool:
    values = [
        [node["const"]] if "const" in node else node.get("enum")
        for node in (first, second)
        if isinstance(node, dict)
    ]
    if len(values) < 2 or not all(isinstance(some, list) for some in values):
        return False
    return not any(json_equal(a, b) for a in values[0] or () for b in values[1] or ())
