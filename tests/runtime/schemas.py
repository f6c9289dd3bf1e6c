"""Thirty JSON schemas of the kinds that people write; each can be fulfilled in few tokens."""

from __future__ import annotations

from typing import Any

WORD = {"type": "string", "maxLength": 8}
SMALL = {"type": "integer", "minimum": 0, "maximum": 99}


def obj(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(properties) if required is None else required,
        "additionalProperties": False,
    }


SCHEMAS: list[dict[str, Any]] = [
    {"type": "integer", "minimum": 0, "maximum": 1000},
    {"type": "number", "minimum": -1, "maximum": 1},
    {"type": "boolean"},
    {"type": "null"},
    WORD,
    {"enum": ["red", "green", "blue"]},
    {"const": 42},
    {"type": "string", "pattern": "^[a-z]{2}-[0-9]{3}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "array", "items": SMALL, "maxItems": 4},
    {"type": "array", "items": WORD, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [SMALL, WORD], "minItems": 2, "items": False},
    {"anyOf": [SMALL, WORD]},
    {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    obj(name=WORD, age=SMALL),
    obj(["name"], name=WORD, nickname=WORD),
    obj(point=obj(x=SMALL, y=SMALL)),
    obj(a=obj(b=obj(c=obj(d=SMALL)))),
    obj(tags={"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}),
    obj(kind={"const": "circle"}, radius=SMALL),
    {"anyOf": [obj(circle=SMALL), obj(square=SMALL, colour=WORD)]},
    {"$defs": {"n": SMALL}, "type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 3},
    {
        "$defs": {"node": obj(["value"], value=SMALL, next={"$ref": "#/$defs/leaf"}),
                  "leaf": obj(value=SMALL)},
        "$ref": "#/$defs/node",
    },
    obj(id={"type": "string", "pattern": "^[A-F0-9]{4}$"}, ok={"type": "boolean"}),
    {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
    {"type": "object", "patternProperties": {"^[a-z]{1,4}$": SMALL},
     "additionalProperties": False, "maxProperties": 2},
    {"allOf": [obj(a=SMALL)]},
    obj(score={"type": "number", "exclusiveMinimum": 0, "maximum": 5}, label=WORD),
    {"type": "array", "items": obj(k=WORD, v={"anyOf": [SMALL, {"type": "null"}]}), "maxItems": 2},
]  # fmt: skip
