"""The arguments of a call that come as JSON, told while they come."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorun.chat.call_parsing import calls_from_json
from nanorun.chat.json_arguments import JsonArguments
from nanorun.chat.tool_values import ToolSet

PROPERTIES = {"a": {"type": "string"}, "b": {"type": "integer"}, "c": {}, "é\n": {"type": "string"}}
TOOLS = ToolSet([{"name": "f", "parameters": {"properties": PROPERTIES}}])


def told(*pieces: str) -> list[str]:
    spec = TOOLS.find("f")
    assert spec is not None
    arguments = JsonArguments(spec)
    return [arguments.add(piece) for piece in pieces]


def read(text: str) -> str:
    """The arguments' JSON text once they are read."""
    (call,) = calls_from_json(json.dumps({"name": "f", "arguments": text}), TOOLS)
    assert call.is_whole
    return json.dumps(call.arguments, ensure_ascii=False)


def test_string_is_told_while_it_comes_and_other_values_when_they_end() -> None:
    pieces = told('{ "a"', ':"x', "y\\", 'nz" ', ', "b": "1', '2" ', ',"c":[1,"]}', '"]', "}")
    before_b = ["", '{"a": "x', "y", '\\nz"', "", ""]
    assert pieces == [*before_b, ', "b": 12', "", ', "c": [1, "]}"]']


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", ""),
        ('{"a": "x\\q0123456789ab"}', '{"a": "x'),
        ('{"a": "x" "b": 1}', '{"a": "x"'),
        ('{"a": "x", b: 1}', '{"a": "x"'),
        ('{"a": "x", "b": nope, "c": 1}', '{"a": "x"'),
        ('{"a": "x", "a": "y"}', '{"a": "x"'),
        ('{"a": "\\ud83d alone, then more"}', '{"a": "'),
        ('{"' + "k" * 2000, ""),
    ],
)
def test_nothing_is_told_after_what_is_no_json(text: str, says: str) -> None:
    assert "".join(told(*text)) == "".join(told(text)) == says


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('"\\\n🧮/'))


@given(
    arguments=st.dictionaries(st.sampled_from([*PROPERTIES, "d"]), TEXT | JSON),
    ensure_ascii=st.booleans(),
    indent=st.sampled_from([None, 0, 2]),
    places=st.lists(st.integers(0, 2000), max_size=30),
)
@settings(max_examples=1000, deadline=None)
def test_what_is_told_is_the_beginning_of_what_is_read(
    arguments: dict[str, Any], ensure_ascii: bool, indent: int | None, places: list[int]
) -> None:
    text = json.dumps(arguments, ensure_ascii=ensure_ascii, indent=indent)
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    said = "".join(told(*(text[a:b] for a, b in pairwise(edges))))
    assert read(text) == (f"{said}}}" if arguments else "{}")


def test_long_string_comes_in_many_pieces() -> None:
    text = json.dumps({"a": "0123456789" * 500})
    pieces = told(*(text[i : i + 5] for i in range(0, len(text), 5)))
    assert sum(map(bool, pieces)) > 900
    assert "".join(pieces) + "}" == text
