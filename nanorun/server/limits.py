"""How much a body may hold beside its bytes, so that no request costs more than its text.

What is far beyond anything that clients send is refused here, by name, before anything walks
through it: lists of a million empty messages, schemas that take minutes to become a grammar,
nesting that would run into Python's own limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, model_validator

from nanorun.server.errors import invalid

MAX_MESSAGES = 10_000
MAX_TOOLS = 1_024
MAX_DEPTH = 100
"""Python stops at 1,000 calls, and what walks a schema takes several a level."""
MAX_SCHEMA_CHARS = 1_000_000

_LISTS = {"messages": MAX_MESSAGES, "input": MAX_MESSAGES, "tools": MAX_TOOLS}
_SCHEMAS = (
    "response_format", "structured_outputs", "json_schema", "guided_json", "format", "text",
    "output_config", "output_format",
)  # fmt: skip
"""Fields that may hold a schema for the answer."""


class LimitedBody(BaseModel):
    """A body that is looked at before anything else is done with it."""

    @model_validator(mode="before")
    @classmethod
    def _within_limits(cls, value: Any) -> Any:
        if isinstance(value, dict):
            check_limits(value)
        return value


def check_limits(body: Mapping[str, Any]) -> None:
    """Refuse a body that holds more than any client sends.

    Raises:
        ApiError: 400 that names the field and the limit.
    """
    _check_depth(body)
    for name, n_most in _LISTS.items():
        items = body.get(name)
        if isinstance(items, list) and len(items) > n_most:
            raise invalid(name, f"it has {len(items)} items, and no more than {n_most} are taken")
    for i, tool in enumerate(_tools(body)):
        _check_schema(tool, f"tools[{i}]")
    for name in _SCHEMAS:
        _check_schema(body.get(name), name)


def _tools(body: Mapping[str, Any]) -> Iterable[Any]:
    tools = body.get("tools")
    return tools if isinstance(tools, list) else ()


def _check_schema(schema: Any, name: str) -> None:
    n_chars = sum(_sizes(schema))
    if n_chars > MAX_SCHEMA_CHARS:
        problem = f"it has {n_chars} characters, and no more than {MAX_SCHEMA_CHARS} are taken"
        raise invalid(name, problem)


def _sizes(value: Any) -> Iterator[int]:
    """Characters of all names and texts in a value, with one for whatever else there is."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield len(key)
            yield from _sizes(item)
    elif isinstance(value, list):
        for item in value:
            yield from _sizes(item)
    else:
        yield len(value) if isinstance(value, str) else 1


def _check_depth(body: Mapping[str, Any]) -> None:
    """Look level by level, which needs no recursion."""
    for name, value in body.items():
        level = [value]
        for _ in range(MAX_DEPTH):
            level = [inner for outer in level for inner in _containers(outer)]
            if not level:
                break
        else:
            raise invalid(name, f"it is nested deeper than the {MAX_DEPTH} levels that are taken")


def _containers(value: Any) -> list[Any]:
    """The lists and objects directly in a value."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in items if isinstance(item, dict | list)]
