"""What a request's answer must look like."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nanorun.model.chat import Grammar
from nanorun.server.errors import ApiError

_FORM = '{"type": "json_schema", "json_schema": {"name": NAME, "schema": SCHEMA}}'


class JsonSchema(BaseModel):
    """A schema and its name."""

    name: str = ""
    description: str | None = None
    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")] = True
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What the answer must look like, in OpenAI's words."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="before")
    @classmethod
    def _find_schema(cls, value: Any) -> Any:
        """Take a schema from where other servers have it, if its meaning is plain."""
        if not isinstance(value, dict):
            return value
        beside = value.get("schema")
        wrapped = value.get("json_schema")
        if value.get("type") in ("json_object", "json_schema") and beside is not None:
            if wrapped is not None:
                raise ValueError("it has both schema and json_schema; give one of them")
            return {"type": "json_schema", "json_schema": {"name": "schema", "schema": beside}}
        if isinstance(wrapped, dict) and "schema" not in wrapped:
            if not wrapped.keys() & {"type", "properties", "$ref", "anyOf", "oneOf", "allOf"}:
                raise ValueError(f"json_schema has no schema; the form is {_FORM}")
            return {**value, "json_schema": {"name": "schema", "schema": wrapped}}
        return value

    def schema_text(self, field: str = "response_format") -> str | None:
        """The schema as JSON; None for free text.

        Args:
            field: Where the format stands in the request, for the error.

        Raises:
            ApiError: If there is none though the type says so.
        """
        if self.type == "text":
            return None
        if self.type == "json_object":
            return '{"type": "object"}'
        if self.json_schema is None:
            raise ApiError(400, f"{field} has no schema", code="invalid_value", param=field)
        return json.dumps(self.json_schema.schema_)


class StructuredOutputs(BaseModel):
    """What the answer must look like, in vLLM's words; one of the fields."""

    model_config = ConfigDict(extra="forbid")

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None
    """In llguidance's dialect of Lark."""

    @model_validator(mode="after")
    def _check_one(self) -> StructuredOutputs:
        given = [
            name
            for name in ("json_", "regex", "choice", "grammar")
            if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError(f"it gives {' and '.join(given).replace('_', '')}; give one of them")
        return self

    def to_grammar(self) -> Grammar | None:
        """The form as the engine takes it."""
        if self.json_ is not None:
            text = self.json_ if isinstance(self.json_, str) else json.dumps(self.json_)
            return Grammar("json_schema", text)
        if self.choice is not None:
            words = (json.dumps(word, ensure_ascii=False) for word in self.choice)
            return Grammar("lark", f"start: {' | '.join(words)}")
        if self.regex is not None:
            return Grammar("regex", self.regex)
        return None if self.grammar is None else Grammar("lark", self.grammar)
