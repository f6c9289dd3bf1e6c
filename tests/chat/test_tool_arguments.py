"""The arguments of a tool call, told while the model writes them."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorun.chat.argument_text import ArgumentsText, ValueText
from nanorun.chat.parser import ReplyParser
from nanorun.model.chat import (
    Event,
    TextDelta,
    ToolArguments,
    ToolCall,
    ToolCallBegun,
    ToolCallDelta,
    arguments_text,
)
from tests.support.calls import assert_told

WRITE = {
    "type": "function",
    "function": {
        "name": "write",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "n": {"type": "integer"},
                "mode": {"type": "string", "enum": ["a", "w"]},
                "note": {"type": ["string", "null"]},
            },
        },
    },
}
HEAD = "<tool_call>\n<function=write>\n"
TEXT_HEAD = "<parameter=text>\n"
TAIL = "</function>\n</tool_call>"


def events_of(*pieces: str, tools: tuple[Any, ...] = (WRITE,)) -> list[Event]:
    parser = ReplyParser(starts_in_thinking=False, tools=tools, id_prefix="")
    events = [event for piece in pieces for event in parser.feed(piece.encode())]
    return events + parser.finish()


def arguments_of(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, ToolArguments)]


# -- when what is told ----------------------------------------------------------------------------


def test_call_is_told_piece_by_piece() -> None:
    parser = ReplyParser(starts_in_thinking=False, tools=[WRITE], id_prefix="c")
    fed = [
        "<tool_call>\n<function=wri",
        "te>\n<parameter=text>\n",
        'say "',
        "hi\n",
        "now\n</para",
        "meter>\n",
        "<parameter=n>\n1",
        "2\n</parameter>\n",
        "</function>",
    ]
    told = [parser.feed(piece.encode()) for piece in fed]
    call = ToolCall("c0", "write", {"text": 'say "hi\nnow', "n": 12})
    assert told == [
        [],
        [ToolCallBegun(0, "c0", "write"), ToolArguments(0, '{"text": "')],
        [ToolArguments(0, 'say \\"')],
        [ToolArguments(0, "hi")],
        [ToolArguments(0, "\\nnow")],
        [],
        [ToolArguments(0, '"')],
        [],
        [ToolArguments(0, ', "n": 12}'), ToolCallDelta(0, call)],
    ]


def test_long_string_comes_in_many_pieces() -> None:
    value = "0123456789" * 500
    reply = f"{HEAD}{TEXT_HEAD}{value}\n</parameter>\n{TAIL}"
    pieces = arguments_of(events_of(*(reply[i : i + 5] for i in range(0, len(reply), 5))))
    assert len(pieces) > 900
    assert json.loads("".join(pieces)) == {"text": value}


@pytest.mark.parametrize(
    "parameter",
    [
        "<parameter=mode>\n w\n</parameter>\n",
        "<parameter=note>\nnull\n</parameter>\n",
        "<parameter=n>\n12\n</parameter>\n",
        "<parameter=other>\nx y\n</parameter>\n",
    ],
)
def test_value_that_is_not_its_text_is_told_when_it_is_complete(parameter: str) -> None:
    at = parameter.index("\n</")
    parser = ReplyParser(starts_in_thinking=False, tools=[WRITE])
    assert arguments_of(parser.feed((HEAD + parameter[:at]).encode())) == []
    rest = parser.feed((parameter[at:] + "<parameter=").encode())
    assert len(arguments_of(rest)) == 1


def test_string_with_choices_is_told_without_the_blanks_around_it() -> None:
    events = events_of(HEAD, "<parameter=mode>\n w ", "\n</parameter>\n", TAIL)
    assert "".join(arguments_of(events)) == '{"mode": "w"}'


def test_name_in_other_case_is_told_as_it_is_offered() -> None:
    [begun] = [e for e in events_of(HEAD.replace("w", "W")) if isinstance(e, ToolCallBegun)]
    assert begun.name == "write"


@pytest.mark.parametrize(
    "call",
    [
        HEAD.replace("write", "nope") + TEXT_HEAD + "a\n</parameter>\n</function>",
        '<tool_call>{"name": "write", "arguments": {"text": "a"}}</tool_call>',
    ],
)
def test_call_that_may_still_be_none_is_told_whole(call: str) -> None:
    parser = ReplyParser(starts_in_thinking=False, tools=[WRITE])
    assert parser.feed(call[:-1].encode()) == []
    assert [type(event) for event in parser.feed(call[-1:].encode())] == [
        ToolCallBegun,
        ToolArguments,
        ToolCallDelta,
    ]


def test_index_counts_the_calls_that_began() -> None:
    call = f"{HEAD}{TAIL}\n"
    events = events_of(f"<tool_call>\nno\n</tool_call>\n{call}<tool_call></tool_call>{call}")
    assert_told(events)
    calls = [event for event in events if isinstance(event, ToolCallDelta)]
    assert [(event.index, event.call.name) for event in calls] == [
        (0, ""),
        (0, "write"),
        (1, ""),
        (1, "write"),
    ]
    assert len({event.call.id for event in calls}) == 4


# -- calls that are not what they should be --------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("", "{"),
        ("<parameter=te", "{"),
        (TEXT_HEAD + "rm -rf /tmp", '{"text": "rm -rf /tmp'),
        (TEXT_HEAD + "rm -rf /tmp\n</para", '{"text": "rm -rf /tmp\\n</para'),
        (TEXT_HEAD + "a\n</parameter>\n", '{"text": "a"'),
        (TEXT_HEAD + "a\n</parameter>\n<parameter=n>\n1", '{"text": "a"'),
    ],
)
def test_half_a_call_is_no_json(written: str, told: str) -> None:
    events = events_of(HEAD, written)
    assert_told(events)
    assert "".join(arguments_of(events)) == told
    last = events[-1]
    assert isinstance(last, ToolCallDelta)
    assert last.problem is not None
    assert last.problem.startswith("the reply ends within the call")


def test_json_arguments_that_cannot_be_read_are_no_json() -> None:
    for arguments in ('"{\\"text\\": 1"', "[1]"):
        events = events_of(f'<tool_call>{{"name": "write", "arguments": {arguments}}}</tool_call>')
        assert_told(events)
        assert arguments_of(events) == ["{"]


def test_argument_that_is_given_twice_is_told_once() -> None:
    again = "<parameter=text>\nb\n</parameter>\n"
    events = events_of(HEAD, TEXT_HEAD, "a", "\n</parameter>\n", again, TAIL)
    assert "".join(arguments_of(events)) == '{"text": "a"}'
    last = events[-1]
    assert isinstance(last, ToolCallDelta)
    assert last.problem == "text is given twice, then as 'b'"


def test_text_beside_a_call_does_not_part_its_pieces() -> None:
    events = events_of("Hi.\n", HEAD, f"{TEXT_HEAD}a", "b\n</parameter>\n", TAIL, "\nDone.")
    assert [type(event) for event in events] == [
        *(TextDelta, ToolCallBegun, ToolArguments, ToolArguments, ToolArguments, ToolCallDelta),
        TextDelta,
    ]


# -- any call, cut anywhere ------------------------------------------------------------------------

WORDS = st.lists(
    st.sampled_from(
        [
            *("</parameter>", "</function>", "</tool_call>", "<tool_call>", "<parameter=n>"),
            *("</param", "<", ">", "\n", "\n\n", " ", "\t", '"', "\\", "é", "🧮", "a", "word"),
            *("</function>\n", "\n</parameter>\n", "<parameter=", "{", "}"),
        ]
    )
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    max_size=12,
).map("".join)
TYPES = ["string", "integer", "number", "boolean", "null", "array", "object"]
SCHEMA = st.one_of(
    st.just({"type": "string"}),
    st.sampled_from(TYPES).map(lambda kind: {"type": kind}),
    st.lists(st.sampled_from(TYPES), min_size=1, max_size=3).map(lambda kinds: {"type": kinds}),
    st.just({"type": "string", "enum": ["a", "b c"]}),
    st.just({}),
)
NAMES = st.text("abcñ_-0 ", min_size=1, max_size=4).map(str.strip).filter(bool)
VALUE = st.one_of(
    WORDS, st.sampled_from(["1", "2.5", "true", "None", '["x", {"y": null}]', "a", " b c "])
)
END = st.sampled_from(["\n</parameter>\n", "</parameter>", "\n</parameter>\n\n", "\n", ""])


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in pairwise(edges)]


@given(
    properties=st.dictionaries(NAMES, SCHEMA, max_size=4),
    values=st.lists(VALUE, min_size=6, max_size=6),
    others=st.lists(NAMES, max_size=2),
    ends=st.lists(END, min_size=6, max_size=6),
    tail=st.sampled_from(
        ["</function>\n</tool_call>", "</tool_call>", "</function>", "", "</func"]
    ),
    places=st.lists(st.integers(0, 5000), max_size=30),
    by_token=st.booleans(),
)
@settings(max_examples=1500, deadline=None)
def test_pieces_of_any_call_make_its_arguments(
    properties: dict[str, Any],
    values: list[str],
    others: list[str],
    ends: list[str],
    tail: str,
    places: list[int],
    by_token: bool,
) -> None:
    tool = {"name": "f", "parameters": {"type": "object", "properties": properties}}
    written = zip([*properties, *others], values, ends, strict=False)
    arguments = "".join(f"<parameter={name}>\n{value}{end}" for name, value, end in written)
    body = f"\n<function=f>\n{arguments}{tail}".encode()
    parser = ReplyParser(starts_in_thinking=False, tools=[tool])
    events = parser.feed(b"<tool_call>", control=by_token)
    for piece in cut(body, places):
        events += parser.feed(piece)
    events += parser.finish()
    assert_told(events)
    assert parser.n_tool_calls > 0


@given(
    arguments=st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"])), max_size=4),
    places=st.lists(st.integers(0, 5000), max_size=30),
)
@settings(max_examples=500, deadline=None)
def test_strings_as_the_template_writes_them_are_told_without_a_problem(
    arguments: dict[str, str], places: list[int]
) -> None:
    schema = {name: {"type": "string"} for name in arguments}
    tool = {"name": "f", "parameters": {"properties": schema}}
    written = (f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    text = f"<tool_call>\n<function=f>\n{''.join(written)}{TAIL}"
    parser = ReplyParser(starts_in_thinking=False, tools=[tool], id_prefix="")
    events = [event for piece in cut(text.encode(), places) for event in parser.feed(piece)]
    call = ToolCall("0", "f", arguments)
    assert events[-1] == ToolCallDelta(0, call)
    assert "".join(arguments_of(events)) == arguments_text(call)


# -- the parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "certain"),
    [
        ("", ""),
        ("\n", ""),
        ("\n\n", ""),
        ("\na\n", "a"),
        ("\na\n\n", "a\n"),
        ("a\n b", "a\n b"),
        ("a\n</parameter>\n</function>\n", "a"),
        ("a</function>\n \n", "a"),
        ("a</function>\n</parameter>", "a</function>"),
        ("a\n</parameter>\n</parameter>\n", "a\n</parameter>"),
        ("a</function></function>", "a</function>"),
        ("a\n</function>\nb", "a\n</function>\nb"),
        ("a\n</parameter", "a\n</parameter"),
    ],
)
def test_what_may_be_the_end_of_a_value_is_held_back(text: str, certain: str) -> None:
    value = ValueText()
    assert value.add(text) == certain
    assert value.rest(f"{certain}xyz") == "xyz"


def test_pieces_of_an_object_make_what_json_makes_of_it() -> None:
    text = ArgumentsText()
    pieces = [
        text.begin_string('a"'),
        text.string("é\n"),
        text.end_string("\u2028 "),
        text.value("b", {"c": [1.5, None]}),
    ]
    assert "".join(pieces) + "}" == json.dumps(
        {'a"': "é\n\u2028 ", "b": {"c": [1.5, None]}}, ensure_ascii=False
    )


def test_every_character_of_a_value_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    n_read = 0
    add = ValueText.add

    def counted(value: ValueText, text: str) -> str:
        nonlocal n_read
        n_read += len(text)
        return add(value, text)

    monkeypatch.setattr(ValueText, "add", counted)
    value = "a < b \n" * 2000 + "</function> \n" * 500
    reply = f"{HEAD}{TEXT_HEAD}{value}\n</parameter>\n{TAIL}"
    events = events_of(*(reply[i : i + 3] for i in range(0, len(reply), 3)))
    assert json.loads("".join(arguments_of(events))) == {"text": value}
    assert n_read == len(value) + 2  # and the line breaks around it
