"""What a tool expects, and how the text of an argument becomes a value of the right type.

Nemotron writes strings as they are and everything else as JSON; which of the two a text is, the
tool's JSON schema decides. A value that does not fit is kept as text and reported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
_ALL_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
_PYTHON_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "dict": "object",
    "list": "array",
}
"""What schemas written by hand from Python signatures say."""
_PYTHON_WORDS = {"True": True, "False": False, "None": None}
_MAX_REFS = 16
_MAX_DEPTH = 64
"""Of nested values; whoever passes them on may recurse."""
_N_SHOWN = 60


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool that was offered to the model."""

    name: str
    schema: Mapping[str, Any]
    """JSON schema of its parameters."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Schema of each parameter by name."""
        return _mapping(self.schema.get("properties"))

    @property
    def required(self) -> tuple[str, ...]:
        """Parameters that every call must give."""
        names = self.schema.get("required")
        return tuple(map(str, names)) if isinstance(names, (list, tuple)) else ()

    @property
    def is_open(self) -> bool:
        """Whether parameters without a schema of their own are welcome."""
        extra = self.schema.get("additionalProperties")
        return not self.parameters or (extra is not None and extra is not False)


class ToolSet:
    """The tools offered in one request, by name."""

    def __init__(self, tools: Iterable[Mapping[str, Any]]) -> None:
        specs = [_spec(tool) for tool in tools]
        self._specs = {spec.name: spec for spec in specs if spec.name}

    def __bool__(self) -> bool:
        return bool(self._specs)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tools, in the order offered."""
        return tuple(self._specs)

    def find(self, name: str) -> ToolSpec | None:
        """The tool called `name`, or the only one whose name differs in case alone."""
        if name in self._specs:
            return self._specs[name]
        alike = [spec for spec in self._specs.values() if spec.name.lower() == name.lower()]
        return alike[0] if len(alike) == 1 else None


def _spec(tool: Any) -> ToolSpec:
    function = _mapping(_mapping(tool).get("function")) or _mapping(tool)
    return ToolSpec(str(function.get("name") or ""), _mapping(function.get("parameters")))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def load_json(text: str) -> Any:
    """Read JSON as models write it: line breaks inside strings are allowed.

    Raises:
        ValueError: If it is not JSON, is nested out of all reason, or holds a number that JSON
            cannot carry on.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return _clean(value, _MAX_DEPTH)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _refuse_constant(number)


_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse_constant, parse_float=_finite)


def _clean(value: Any, depth: int) -> Any:
    """`value` without lone surrogates, which JSON can spell but UTF-8 cannot carry."""
    if depth == 0:
        raise ValueError("nested too deeply")
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_clean(item, depth - 1) for item in value]
    if isinstance(value, dict):
        return {_clean(key, depth): _clean(item, depth - 1) for key, item in value.items()}
    return value


def is_plain_text(spec: ToolSpec, name: str) -> bool:
    """Whether the value of an argument is its text as it stands, whatever that is."""
    schema = _resolve(spec.parameters.get(name), spec.schema)
    return _types(schema, spec.schema) == {"string"} and "enum" not in schema


def value_from_text(text: str, spec: ToolSpec, name: str) -> tuple[Any, str | None]:
    """The value that an argument's text stands for, and what is wrong with it, if anything."""
    schema = _resolve(spec.parameters.get(name), spec.schema)
    types = _types(schema, spec.schema)
    if types == {"string"}:
        return _string(text, schema)
    value, is_json = _json_or_text(text)
    if isinstance(value, str) and is_json and "string" not in types:
        value, _ = _json_or_text(value)  # a number in quotes
    if is_json and not isinstance(value, str):
        fitting = _fit(value, types)
        if fitting is not _NO_FIT:
            return fitting, _enum_problem(fitting, schema)
    if "string" in types:
        return text, _enum_problem(text, schema)
    return text, f"expected {_wording(types)}, found {_shown(text)}"


def value_from_json(value: Any, spec: ToolSpec, name: str) -> tuple[Any, str | None]:
    """An argument that came as JSON, brought to its type, and what is wrong with it."""
    schema = _resolve(spec.parameters.get(name), spec.schema)
    types = _types(schema, spec.schema)
    fitting = _fit(value, types)
    if fitting is not _NO_FIT:
        return fitting, _enum_problem(fitting, schema)
    if isinstance(value, str):
        return value_from_text(value, spec, name)
    if "string" in types and isinstance(value, (bool, int, float)):
        text = json.dumps(value)
        return text, _enum_problem(text, schema)
    return value, f"expected {_wording(types)}, found {_shown(json.dumps(value))}"


def _string(text: str, schema: Mapping[str, Any]) -> tuple[str, str | None]:
    allowed = schema.get("enum")
    if isinstance(allowed, Sequence) and text not in allowed and text.strip() in allowed:
        return text.strip(), None
    return text, _enum_problem(text, schema)


def _json_or_text(text: str) -> tuple[Any, bool]:
    stripped = text.strip()
    if stripped in _PYTHON_WORDS:
        return _PYTHON_WORDS[stripped], True
    try:
        return load_json(stripped), True
    except ValueError:
        return text, False


class _NoFit:
    """What `_fit` returns for a value of another type."""


_NO_FIT = _NoFit()


def _fit(value: Any, types: frozenset[str]) -> Any:
    """`value` if it is of one of the `types`; 3.0 is also the integer 3."""
    kind = _kind(value)
    if kind in types or (kind == "integer" and "number" in types):
        return value
    if kind == "number" and "integer" in types and float(value).is_integer():
        return int(value)
    return _NO_FIT


def _kind(value: Any) -> str:
    """The JSON schema type of a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):  # before int, of which it is a subclass
        return "boolean"
    kinds = ((str, "string"), (int, "integer"), (float, "number"), (dict, "object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "array")


def _resolve(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow `$ref`s inside the tool's own schema."""
    for _ in range(_MAX_REFS):
        reference = _mapping(schema).get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#"):
            break
        schema = root
        for part in filter(None, reference[1:].split("/")):
            schema = _mapping(schema).get(part.replace("~1", "/").replace("~0", "~"))
    return _mapping(schema)


def _types(schema: Mapping[str, Any], root: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types a schema admits; all of them if it does not say."""
    types: set[str] = set()
    seen: set[int] = set()  # schemas refer to each other, in circles too
    stack = [schema]
    while stack:
        schema = stack.pop()
        if id(schema) in seen:
            continue
        seen.add(id(schema))
        choices = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
        if "type" not in schema and isinstance(choices, (list, tuple)):
            stack.extend(_resolve(choice, root) for choice in choices)
        else:
            types |= _own_types(schema)
    return frozenset(types) or _ALL_TYPES


def _own_types(schema: Mapping[str, Any]) -> frozenset[str]:
    declared = schema.get("type")
    if isinstance(declared, str):
        declared = [declared]
    if isinstance(declared, (list, tuple)):
        names = {_PYTHON_TYPES.get(kind, kind) for kind in declared if isinstance(kind, str)}
        types = _ALL_TYPES & names
    elif isinstance(schema.get("enum"), (list, tuple)):
        types = frozenset(_kind(value) for value in schema["enum"])
    elif "const" in schema:
        types = frozenset({_kind(schema["const"])})
    elif "properties" in schema or "items" in schema:
        types = frozenset({"object" if "properties" in schema else "array"})
    else:
        return _ALL_TYPES
    return types | {"null"} if schema.get("nullable") is True else types


def _enum_problem(value: Any, schema: Mapping[str, Any]) -> str | None:
    allowed = schema.get("enum")
    if not isinstance(allowed, (list, tuple)) or value in allowed:
        return None
    return f"expected one of {_shown(json.dumps(allowed))}, found {_shown(json.dumps(value))}"


def _wording(types: frozenset[str]) -> str:
    return " or ".join(sorted(types))


def _shown(text: str) -> str:
    """`text`, cut to a length that a message can hold."""
    text = text.strip()
    return text if len(text) <= _N_SHOWN else f"{text[:_N_SHOWN]}…"
