"""A schema counts wherever clients put it, or is refused with the right form."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from nanorun.server.openai.formats import ResponseFormat

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    "body",
    [
        {"type": "json_object", "schema": SCHEMA},
        {"type": "json_schema", "schema": SCHEMA},
        {"type": "json_schema", "json_schema": SCHEMA},
        {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
    ],
)
def test_schema_counts_wherever_it_stands(body: dict[str, Any]) -> None:
    assert json.loads(ResponseFormat.model_validate(body).schema_text() or "") == SCHEMA


@pytest.mark.parametrize(
    "body",
    [
        {"type": "json_schema", "json_schema": {"name": "s", "shema": SCHEMA}},
        {"type": "json_object", "schema": SCHEMA, "json_schema": {"schema": SCHEMA}},
    ],
)
def test_schema_is_never_dropped(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="json_schema"):
        ResponseFormat.model_validate(body)
