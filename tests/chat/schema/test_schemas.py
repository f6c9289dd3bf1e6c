"""What zod and pydantic emit is held by llguidance, and judged afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher

from nanorun.chat.schema.checking import check_answer
from nanorun.chat.schema.holding import hold
from nanorun.chat.schema.pattern.matching import is_found
from nanorun.chat.schema.pattern.parsing import PatternError, parse_pattern
from nanorun.errors import NanorunError, UsageError
from tests.chat.schema import pydantic_models
from tests.support.byte_tokens import byte_tokenizer

ZOD = json.loads(Path(__file__).with_name("zod.json").read_text())["schemas"]
ALL = {**ZOD, **{f"pydantic {k}": v for k, v in pydantic_models.schemas().items()}}


TOKENIZER = byte_tokenizer(b"<|im_end|>")


def accepts(schema: Any, text: str) -> bool:
    lark = f"start: a\na: %json {json.dumps(hold(schema).schema)}"
    matcher = LLMatcher(TOKENIZER, LLMatcher.grammar_from_lark(lark), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    wanted = list(text.encode())
    return matcher.try_consume_tokens(wanted) == len(wanted) and matcher.is_accepting()


def test_there_are_38_and_40() -> None:
    assert (len(ZOD), len(pydantic_models.TYPES)) == (38, 40)


@pytest.mark.parametrize("name", ALL)
def test_what_zod_and_pydantic_emit_is_held(name: str) -> None:
    accepts(ALL[name], "")


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"properties": {"a": {"type": "integer"}}}, '{"a": 1}', '{"a": 1, "b": 2}'),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, '{"b": 2}', '{"b": "x"}'),
        ({"allOf": [{"properties": {"a": {}}}, {"required": ["a", "b"]}]}, '{"a":1,"b":2}', "{}"),
        ({"type": "string", "nullable": True, "maxLength": 1}, "null", '"ab"'),
        ({"type": "integer", "minimum": 0, "exclusiveMinimum": True}, "1", "0"),
        ({"items": [{"const": 1}], "additionalItems": False}, "[1]", "[1, 1]"),
        ({"type": "integer", "maximum": 2**63 - 1, "minimum": -(2**63)}, "5", "9" * 19),
        ({"type": "string", "pattern": "b"}, '"abc"', '"a"'),
        ({"type": "string", "pattern": "^[^[]$"}, '"a"', '"["'),
        ({"format": "date"}, '"2024-02-29"', '"2023-02-29"'),
        ({"properties": {"a": {"not": {}}}, "additionalProperties": {}}, '{"b":1}', '{"a":1}'),
        ({"propertyNames": {"enum": ["a"]}, "type": "object"}, '{"a":1}', '{"b":1}'),
        ({"type": "object", "properties": {"n": {"$ref": "#"}}}, '{"n":{"n":{}}}', '{"n":1}'),
        ({"type": "array", "items": {}}, "[1,  2]", "[1,   2]"),
    ],
)
def test_held_schemas_take_what_they_should(schema: Any, good: str, bad: str) -> None:
    assert accepts(schema, good) and not accepts(schema, bad)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"uniqueItems": True, "type": "array"}, "[1, 1]"),
        ({"type": "string", "pattern": r"^\d{3}(?!0)"}, '"1230"'),
        ({"type": "string", "pattern": r"^(.)\1$"}, '"ab"'),
        ({"const": 9007199254740993}, "9007199254740992"),
        ({"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 3}]}, "4"),
    ],
)
def test_what_is_dropped_is_told_and_checked(schema: Any, text: str) -> None:
    assert hold(schema).dropped
    assert accepts(schema, text) or "const" in schema
    assert check_answer(text, schema)


def test_decimals_are_checked_digit_by_digit() -> None:
    assert check_answer("0.29", json.loads('{"multipleOf": 0.01}')) == []


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "frob"}, "type"),
        ({"$ref": "#/nowhere"}, "#/nowhere"),
        ({"properties": [1]}, "properties"),
        ({"type": "string", "pattern": r"\Aab\Z"}, "write ^"),
        (False, "no value"),
    ],
)
def test_what_means_nothing_is_refused_by_name(schema: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        hold(schema)
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("^a|b$", "xb", True), ("(^|,)a(,|$)", "xa", False), (r"^\w$", "é", False),
        ("^.$", "\u2028", False), (r"^\s$", "\ufeff", True), ("(?i)^abc$", "aBC", True),
        ("^(a+)+$", "a" * 3000 + "b", False), ("^[a&&b]+$", "&", True), ("^[^]$", "\n", True),
    ],
)  # fmt: skip
def test_patterns_mean_what_ecma_262_says(pattern: str, text: str, found: bool) -> None:
    assert is_found(parse_pattern(pattern), text) is found
    schema = {"type": "string", "pattern": pattern}
    assert accepts(schema, json.dumps(text, ensure_ascii=False)) is found


def test_other_dialects_are_refused() -> None:
    for pattern in ("a{,3}", "a**", r"\Z", "(", "(?#x)", r"\2(a)"):
        with pytest.raises(PatternError):
            parse_pattern(pattern)


KEYWORDS = [
    "type", "enum", "const", "properties", "items", "anyOf", "allOf", "oneOf", "$ref", "pattern",
    "minimum", "maxItems", "required", "additionalProperties", "nullable", "not", "format",
]  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
    | st.sampled_from(["string", "object", "#", "#/x", "date", "^a", "(", "array"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(KEYWORDS), VALUES))
def test_random_schemas_raise_nothing_but_our_errors(schema: Any) -> None:
    try:
        hold(schema)
    except NanorunError:
        return
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError:
        return
    check_answer('{"a": [1, "x"]}', schema)
