"""Arguments: strings as they are, all else JSON, as the tool's schema says."""

from __future__ import annotations

from typing import Any

import pytest

from nanorun.chat.tool_values import ToolSet, ToolSpec, load_json, value_from_json, value_from_text


def spec(schema: dict[str, Any], **root: Any) -> ToolSpec:
    return ToolSpec("f", {"type": "object", "properties": {"x": schema}, **root})


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "42", "42"),
        ({"type": "string"}, '"quoted"', '"quoted"'),
        ({"type": "string"}, " \n as it is ", " \n as it is "),
        ({"type": "string"}, "null", "null"),
        ({"enum": ["a", "b"]}, " a\n", "a"),
        ({"type": "integer"}, "42", 42),
        ({"type": "integer"}, " 42\n", 42),
        ({"type": "integer"}, "42.0", 42),
        ({"type": "integer"}, '"42"', 42),
        ({"type": "number"}, "42", 42),
        ({"type": "number"}, "-1.5e3", -1500.0),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "null"}, "None", None),
        ({"type": "object"}, '{"a": {"b": "}"}}', {"a": {"b": "}"}}),
        ({"type": "array"}, '[1, "a\nb"]', [1, "a\nb"]),
        ({"type": ["integer", "null"]}, "null", None),
        ({"type": ["integer", "string"]}, "42", 42),
        ({"type": ["integer", "string"]}, "42 km", "42 km"),
        ({"type": ["integer", "string"]}, '"42"', '"42"'),
        ({"type": "integer", "nullable": True}, "null", None),
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "True", True),
        ({"oneOf": [{"type": "string"}, {"type": "array"}]}, "[1]", [1]),
        ({"$ref": "#/$defs/n"}, "7", 7),
        ({"$ref": "#/properties/x"}, "7", 7),
        ({"anyOf": [{"$ref": "#/properties/x"}] * 50}, "7", 7),
        ({"allOf": [{"$ref": "#/$defs/n"}], "default": 1}, "7", 7),
        ({"const": 3}, "3", 3),
        ({"properties": {}}, "{}", {}),
        ({"items": {}}, "[]", []),
        ({"type": "int"}, "5", 5),
        ({}, "5", 5),
        ({}, "five", "five"),
        ({}, '"five"', '"five"'),
        ({"type": 3, "enum": 4, "anyOf": 5, "$ref": 6}, "5", 5),
    ],
)
def test_text_becomes_a_value_of_its_type(schema: Any, text: str, value: Any) -> None:
    found, problem = value_from_text(
        text, spec(schema, **{"$defs": {"n": {"type": "integer"}}}), "x"
    )
    assert (found, type(found), problem) == (value, type(value), None)


@pytest.mark.parametrize(
    ("schema", "text", "problem"),
    [
        ({"type": "integer"}, "three", "expected integer, found three"),
        ({"type": "integer"}, "3.5", "expected integer, found 3.5"),
        ({"type": "integer"}, "true", "expected integer, found true"),
        ({"type": "boolean"}, "1", "expected boolean, found 1"),
        ({"type": ["object", "null"]}, "[1]", "expected null or object, found [1]"),
        ({"type": "array"}, "[1", "expected array, found [1"),
        ({"type": "number"}, "1e999", "expected number, found 1e999"),
        ({"type": "number"}, "NaN", "expected number, found NaN"),
        ({"enum": ["a", "b"]}, "c", 'expected one of ["a", "b"], found "c"'),
        ({"type": "array"}, "[" * 9999 + "]" * 9999, f"expected array, found {'[' * 60}…"),
    ],
)
def test_text_that_does_not_fit_is_kept_and_reported(schema: Any, text: str, problem: str) -> None:
    assert value_from_text(text, spec(schema), "x") == (text, problem)


@pytest.mark.parametrize(
    ("schema", "given", "value", "problem"),
    [
        ({"type": "string"}, "a", "a", None),
        ({"type": "string"}, 5, "5", None),
        ({"type": "string"}, True, "true", None),
        ({"type": "string"}, [1], [1], "expected string, found [1]"),
        ({"type": "integer"}, "5", 5, None),
        ({"type": "integer"}, 5.0, 5, None),
        ({"type": "integer"}, "x", "x", "expected integer, found x"),
        ({"type": "object"}, '{"a": 1}', {"a": 1}, None),
        ({"enum": [1, 2]}, 3, 3, "expected one of [1, 2], found 3"),
        ({}, {"a": None}, {"a": None}, None),
    ],
)
def test_json_is_brought_to_its_type(
    schema: Any, given: Any, value: Any, problem: str | None
) -> None:
    assert value_from_json(given, spec(schema), "x") == (value, problem)


def test_json_that_utf8_cannot_carry_is_repaired() -> None:
    assert load_json('{"\\ud800": ["a\\udfff"], "😀": "\\ud83d\\ude00"}') == {
        "\ufffd": ["a\ufffd"],
        "😀": "😀",
    }


@pytest.mark.parametrize("text", ["", "{", "{} {}", "Infinity", "[" * 65 + "]" * 65, "9" * 5000])
def test_what_is_no_usable_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        load_json(text)


def test_tools_are_found_by_name() -> None:
    tools = ToolSet([{"function": {"name": "Add"}}, {"name": "sub"}, {"function": None}, {}])
    assert tools.names == ("Add", "sub")
    found = tools.find("add")
    assert found is not None
    assert found.name == "Add"
    assert tools.find("mul") is None
    assert not ToolSet([])


@pytest.mark.parametrize(
    "tool", [None, 3, "f", [], ["f"], {"name": 3}, {"name": "f", "parameters": ["x"]}]
)
def test_tool_that_makes_no_sense_has_no_say(tool: Any) -> None:
    found = ToolSet([tool]).find("f")
    assert found is None or (found.parameters, found.required) == ({}, ())


def test_case_alone_does_not_choose_between_two_tools() -> None:
    tools = ToolSet([{"name": "run"}, {"name": "Run"}])
    assert tools.find("RUN") is None
    assert tools.find("Run") is not None


@pytest.mark.parametrize(
    ("schema", "is_open"),
    [
        ({}, True),
        ({"properties": {"a": {}}}, False),
        ({"properties": {"a": {}}, "additionalProperties": False}, False),
        ({"properties": {"a": {}}, "additionalProperties": True}, True),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "string"}}, True),
    ],
)
def test_tool_says_whether_more_parameters_are_welcome(schema: Any, is_open: bool) -> None:
    assert ToolSpec("f", schema).is_open is is_open
