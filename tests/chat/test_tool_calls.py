"""Tool calls as models write them: the right call, or a problem with the text it is about."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nanorun.chat.parser import ReplyParser
from nanorun.model.chat import TextDelta, ThinkingDelta, ToolArguments, ToolCallBegun, ToolCallDelta
from tests.support.calls import assert_told

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"type": "string", "enum": ["c", "f"]},
                "exact": {"type": "boolean"},
                "place": {"type": "object"},
            },
            "required": ["city"],
        },
    },
}
CALC = {
    "type": "function",
    "function": {
        "name": "calc",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}

Call = tuple[str, dict[str, Any], str | None]
Read = list[str | Call]


def read(text: str, tools: tuple[Any, ...] = (WEATHER, CALC), n_step: int = 0) -> Read:
    """Calls and answer text of a reply that arrives whole, or `n_step` bytes at a time."""
    parser = ReplyParser(starts_in_thinking=False, tools=tools)
    data = text.encode()
    n_step = n_step or len(data) or 1
    pieces = [data[i : i + n_step] for i in range(0, len(data), n_step)]
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    assert_told(events)
    found: Read = []
    for event in events:
        if isinstance(event, ToolCallDelta):
            json.dumps(event.call.arguments, allow_nan=False).encode()
            found.append((event.call.name, event.call.arguments, event.problem))
        elif isinstance(event, TextDelta) and found and isinstance(found[-1], str):
            found[-1] += event.text
        elif isinstance(event, TextDelta):
            found.append(event.text)
    return found


HEAD = "<tool_call>\n<function=get_weather>\n"
CITY = "<parameter=city>\nParis\n</parameter>\n"
DAYS = "<parameter=days>\n3\n</parameter>\n"
TAIL = "</function>\n</tool_call>"
CALC_HEAD = "<tool_call>\n<function=calc>\n<parameter=expression>\n"
CALC_TAIL = "\n</parameter>\n</function>\n</tool_call>"
PARIS: Call = ("get_weather", {"city": "Paris"}, None)
TWO_DAYS: Call = ("get_weather", {"city": "Paris", "days": 3}, None)
ONE: Call = ("calc", {"expression": "1"}, None)
JSON = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
CUT_OFF = "the reply ends within the call"


def weather(problem: str | None, **arguments: Any) -> Call:
    return ("get_weather", arguments, problem)


def calc(expression: Any, problem: str | None = None) -> Call:
    return ("calc", {"expression": expression}, problem)


def unusable(problem: str) -> Call:
    return ("", {}, problem)


SLIPS: dict[str, tuple[str, Read]] = {
    # the right call
    "as it should be": (HEAD + CITY + DAYS + TAIL, [TWO_DAYS]),
    "no parameters": ("<tool_call>\n<function=get_weather>\n" + TAIL, [weather("city missing")]),
    "no line breaks": (HEAD.replace("\n", "") + CITY.replace("\n", "") + TAIL, [PARIS]),
    "blank lines": (HEAD.replace("\n", "\n\n") + CITY + "\n\n" + TAIL, [PARIS]),
    "no break after a value": (HEAD + "<parameter=city>\nParis</parameter>\n" + TAIL, [PARIS]),
    "no break before a value": (HEAD + "<parameter=city>Paris\n</parameter>\n" + TAIL, [PARIS]),
    "spaces in tags": (HEAD.replace("r>", "r >") + CITY.replace("y>", "y >") + TAIL, [PARIS]),
    "lost brackets": (
        (HEAD + CITY).replace("weather>", "weather").replace("=city>", "=city") + TAIL,
        [PARIS],
    ),
    "name in other case": (HEAD.replace("get_w", "Get_W") + CITY + TAIL, [PARIS]),
    "no </parameter>": (HEAD + "<parameter=city>\nParis\n" + DAYS + TAIL, [TWO_DAYS]),
    "no last </parameter>": (HEAD + "<parameter=city>\nParis\n" + TAIL, [PARIS]),
    "no </function>": (HEAD + CITY + "</tool_call>", [PARIS]),
    "no closing tag but the last": (HEAD + "<parameter=city>\nParis\n</tool_call>", [PARIS]),
    "one line without closing tags": (HEAD + "<parameter=city>Paris</tool_call>", [PARIS]),
    "one line, no closing tags between": (
        HEAD + "<parameter=city>Paris<parameter=days>3" + TAIL,
        [TWO_DAYS],
    ),
    "no </tool_call>": (HEAD + CITY + "</function>", [PARIS]),
    "no </tool_call> before text": (HEAD + CITY + "</function>\nDone.", [PARIS, "Done."]),
    "no </tool_call> before a call": (
        HEAD + CITY + "</function>\n" + CALC_HEAD + "1" + CALC_TAIL,
        [PARIS, ONE],
    ),
    "nothing closed before a call": (HEAD + CITY + CALC_HEAD + "1" + CALC_TAIL, [PARIS, ONE]),
    "text before </tool_call>": (
        HEAD + CITY + "</function>\nDone.</tool_call>!",
        [PARIS, "Done.!"],
    ),
    "text after the call": (HEAD + CITY + TAIL + "\n\nDone.", [PARIS, "Done."]),
    "text after an unclosed value": (
        HEAD + "<parameter=city>Paris</tool_call> Done.",
        [PARIS, "Done."],
    ),
    "text before the function": (
        HEAD.replace(">\n<f", ">\nSure!\n<f") + CITY + TAIL,
        ["Sure!", PARIS],
    ),
    "text before the call": ("Let me see.\n\n" + HEAD + CITY + TAIL, ["Let me see.", PARIS]),
    "doubled <tool_call>": (
        "<tool_call>\n" + HEAD + CITY + TAIL + "\n</tool_call>\nHi",
        [PARIS, "Hi"],
    ),
    "no <tool_call>": ((HEAD + CITY + TAIL).removeprefix("<tool_call>\n") + "\nHi", [PARIS, "Hi"]),
    "two calls": (HEAD + CITY + TAIL + "\n" + CALC_HEAD + "1" + CALC_TAIL, [PARIS, ONE]),
    "two functions in a call": (
        HEAD + CITY + "</function>\n" + CALC_HEAD.removeprefix("<tool_call>\n") + "1" + CALC_TAIL,
        [PARIS, ONE],
    ),
    "two functions run together": (
        HEAD + CITY + CALC_HEAD.removeprefix("<tool_call>\n") + "1" + CALC_TAIL,
        [PARIS, ONE],
    ),
    "text between calls": (
        HEAD + CITY + TAIL + "\nand\n" + CALC_HEAD + "1" + CALC_TAIL,
        [PARIS, "and", ONE],
    ),
    "given twice alike": (HEAD + CITY + CITY + TAIL, [PARIS]),
    "Python's True": (
        HEAD + CITY + "<parameter=exact>\nTrue\n</parameter>\n" + TAIL,
        [weather(None, city="Paris", exact=True)],
    ),
    "nested braces": (
        HEAD + CITY + '<parameter=place>\n{"a": {"b": "}}"}}\n</parameter>\n' + TAIL,
        [weather(None, city="Paris", place={"a": {"b": "}}"}})],
    ),
    "blanks around a choice": (
        HEAD + CITY + "<parameter=unit> c </parameter>\n" + TAIL,
        [weather(None, city="Paris", unit="c")],
    ),
    # values that look like markup
    "value with </tool_call>": (
        CALC_HEAD + 'print("</tool_call>")' + CALC_TAIL,
        [calc('print("</tool_call>")')],
    ),
    "value with <tool_call>": (
        CALC_HEAD + "a <tool_call> b" + CALC_TAIL,
        [calc("a <tool_call> b")],
    ),
    "value with </function>": (CALC_HEAD + "</function>" + CALC_TAIL, [calc("</function>")]),
    "value with parameters": (
        CALC_HEAD + "<a><parameter>x</parameter> y</a>" + CALC_TAIL,
        [calc("<a><parameter>x</parameter> y</a>")],
    ),
    "value with thinking": (
        CALC_HEAD + "<think>\n</think>" + CALC_TAIL,
        [calc("<think>\n</think>")],
    ),
    "value with a whole call in a line": (
        CALC_HEAD
        + "f('<function=calc><parameter=expression>1</parameter></function></tool_call>')"
        + CALC_TAIL,
        [calc("f('<function=calc><parameter=expression>1</parameter></function></tool_call>')")],
    ),
    "value with </parameter> on a line of its own": (
        CALC_HEAD + "<a>\n</parameter>\n</a>" + CALC_TAIL,
        [calc("<a>\n</parameter>\n</a>")],
    ),
    "value of several lines": (CALC_HEAD + "\n  a\n\n" + CALC_TAIL, [calc("\n  a\n\n")]),
    "value of JSON": (CALC_HEAD + '{"name": "x"}' + CALC_TAIL, [calc('{"name": "x"}')]),
    # the JSON form
    "JSON": (f"<tool_call>\n{JSON}\n</tool_call>", [PARIS]),
    "JSON in one line": (f"<tool_call>{JSON}</tool_call>!", [PARIS, "!"]),
    "JSON without </tool_call>": (f"<tool_call>\n{JSON}", [PARIS]),
    "JSON list": (f"<tool_call>\n[{JSON}, {JSON}]\n</tool_call>", [PARIS, PARIS]),
    "JSON with arguments as text": (
        '<tool_call>{"name": "calc", "arguments": "{\\"expression\\": \\"1\\"}"}</tool_call>',
        [ONE],
    ),
    "JSON with parameters": (
        '<tool_call>{"name": "calc", "parameters": {"expression": "1"}}</tool_call>',
        [ONE],
    ),
    "JSON with a line break in a string": (
        '<tool_call>{"name": "calc", "arguments": {"expression": "a\nb"}}</tool_call>',
        [calc("a\nb")],
    ),
    "JSON with a tag in a string": (
        '<tool_call>{"name": "calc", "arguments": {"expression": "</tool_call>"}}</tool_call>',
        [calc("</tool_call>")],
    ),
    # a call, and what is wrong with it
    "unknown tool": (
        HEAD.replace("get_weather", "nope") + CITY + TAIL,
        [("nope", {"city": "Paris"}, "no tool is called 'nope'; offered: get_weather, calc")],
    ),
    "unknown parameter": (
        HEAD + CITY + CITY.replace("city", "town") + TAIL,
        [weather("get_weather has no parameter 'town'", city="Paris", town="Paris")],
    ),
    "wrong type": (
        HEAD + CITY + DAYS.replace("3", "three") + TAIL,
        [weather("days: expected integer, found three", city="Paris", days="three")],
    ),
    "not one of the choices": (
        HEAD + CITY + "<parameter=unit>\nk\n</parameter>\n" + TAIL,
        [weather('unit: expected one of ["c", "f"], found "k"', city="Paris", unit="k")],
    ),
    "required one missing": (HEAD + DAYS + TAIL, [weather("city missing", days=3)]),
    "given twice": (
        HEAD + CITY + CITY.replace("Paris", "Rome") + TAIL,
        [weather("city is given twice, then as 'Rome'", city="Paris")],
    ),
    "tags for names": (
        HEAD + "<city>Paris</city>\n" + TAIL,
        [weather("city missing; text outside the parameters:\n<city>Paris</city>")],
    ),
    "cut off in a value": (HEAD + "<parameter=city>\nPar", [weather(CUT_OFF, city="Par")]),
    "cut off after a parameter": (HEAD + CITY, [weather(CUT_OFF, city="Paris")]),
    "cut off in the name": (
        "<tool_call>\n<function=get_wea",
        [unusable("not a tool call:\n<function=get_wea")],
    ),
    "arguments that are no mapping": (
        '<tool_call>{"name": "calc", "arguments": [1]}</tool_call>',
        [("calc", {}, "expression missing; text outside the parameters:\n[1]")],
    ),
    "arguments that are no JSON": (
        '<tool_call>{"name": "calc", "arguments": "1+1"}</tool_call>',
        [("calc", {}, "expression missing; text outside the parameters:\n1+1")],
    ),
    # no call
    "nothing": ("<tool_call>\n</tool_call>!", [unusable("an empty tool call"), "!"]),
    "no name": (
        "<tool_call>\n<function=>\n" + TAIL,
        [unusable("not a tool call:\n<function=>\n</function>")],
    ),
    "prose": (
        "<tool_call>\nI will call it.\n</tool_call>",
        [unusable("not a tool call:\nI will call it.")],
    ),
    "Python": (
        '<tool_call>calc(expression="1")</tool_call>',
        [unusable('not a tool call:\ncalc(expression="1")')],
    ),
    "another markup": (
        '<tool_call><invoke name="calc"><parameter name="e">1</parameter></invoke></tool_call>',
        [
            unusable(
                'not a tool call:\n<invoke name="calc"><parameter name="e">1</parameter></invoke>'
            )
        ],
    ),
    "JSON of a string": ('<tool_call>"calc"</tool_call>', [unusable('not a tool call:\n"calc"')]),
    "JSON without a name": (
        '<tool_call>{"a": 1, "b": 2}</tool_call>',
        [unusable('not a tool call:\n{"a": 1, "b": 2}')],
    ),
    "JSON of nothing": ("<tool_call>[]</tool_call>", [unusable("not a tool call:\n[]")]),
}
NOT_JSON = {
    "single quotes": "{'name': 'calc'}",
    "a quote too many": '{"name": "calc", "arguments": {"expression": "it"s"}}',
    "NaN": '{"name": "calc", "arguments": {"expression": NaN}}',
    "a comma too many": '{"name": "calc", "arguments": {},}',
}


@pytest.mark.parametrize("name", SLIPS)
def test_call_is_right_or_its_problem_is_told(name: str) -> None:
    text, expected = SLIPS[name]
    assert read(text) == expected


@pytest.mark.parametrize("name", SLIPS)
def test_call_does_not_depend_on_how_it_arrives(name: str) -> None:
    text, _ = SLIPS[name]
    whole = read(text)
    assert [read(text, n_step=n) for n in (1, 2, 3, 7)] == [whole] * 4


@pytest.mark.parametrize("name", NOT_JSON)
def test_broken_json_is_reported_with_its_text(name: str) -> None:
    found, rest = read(f"<tool_call>\n{NOT_JSON[name]}\n</tool_call>\nSorry.")
    assert rest == "Sorry."
    assert isinstance(found, tuple)
    assert found[:2] == ("", {})
    assert found[2] is not None
    assert found[2].startswith("not a tool call (")
    assert found[2].endswith(f"\n{NOT_JSON[name]}")


def test_call_is_there_as_soon_as_its_function_ends() -> None:
    parser = ReplyParser(starts_in_thinking=False, tools=[CALC])
    so_far = parser.feed((CALC_HEAD + "1\n</parameter>\n</function").encode())
    assert not any(isinstance(event, ToolCallDelta) for event in so_far)
    event = parser.feed(b">")[-1]
    assert isinstance(event, ToolCallDelta)
    assert event.call.arguments == {"expression": "1"}


def test_ids_of_calls_differ_between_replies() -> None:
    ids = set()
    for _ in range(2):
        parser = ReplyParser(starts_in_thinking=False, tools=[CALC])
        events = parser.feed((CALC_HEAD + "1" + CALC_TAIL).encode() * 2)
        ids |= {event.call.id for event in events if isinstance(event, ToolCallDelta)}
    assert len(ids) == 4


# -- without tools on offer ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        HEAD + CITY + DAYS + TAIL,
        f"<tool_call>{JSON}</tool_call>",
        "<function=get_weather>\n<parameter=city>\nParis",
        "A call starts with <tool_call> and ends with </tool_call>, like a tag.",
        "<tool_call>",
        "</tool_call>",
        "<tool_call>\n<function=f>\n</function>\n</tool_call>\n\nDone.",
    ],
)
@pytest.mark.parametrize("n_step", [0, 1])
def test_calls_are_text_where_no_tools_are_offered(text: str, n_step: int) -> None:
    assert read(text, tools=(), n_step=n_step) == [text]


def test_calls_by_token_are_text_where_no_tools_are_offered() -> None:
    call = CALC_HEAD + "1" + CALC_TAIL
    body = call.removeprefix("<tool_call>").removesuffix("</tool_call>")
    assert feed("So:\n", ("<tool_call>",), body, ("</tool_call>",), "\nHi") == [
        TextDelta(f"So:\n{call}\nHi")
    ]


@pytest.mark.parametrize("by_token", [True, False])
def test_thinking_ends_with_its_own_tag_where_no_tools_are_offered(by_token: bool) -> None:
    tag = ("<tool_call>",) if by_token else "<tool_call>"
    end = ("</think>",) if by_token else "</think>"
    events = feed("no ", tag, " here\n", end, "\n\nHi", starts_in_thinking=True)
    assert events == [ThinkingDelta("no <tool_call> here"), TextDelta("Hi")]


# -- tags that come as control tokens --------------------------------------------------------------


def feed(*pieces: str | tuple[str], **options: Any) -> list[Any]:
    """Texts and complete calls in pieces of text and, in tuples, of control tokens."""
    parser = ReplyParser(**{"starts_in_thinking": False, "id_prefix": "", **options})
    events: list[Any] = []
    for piece in pieces:
        if isinstance(piece, tuple):
            events += parser.feed(piece[0].encode(), control=True)
        else:
            events += parser.feed(piece.encode())
    events += parser.finish()
    assert_told(events)
    events = [e for e in events if not isinstance(e, ToolCallBegun | ToolArguments)]
    for i in reversed(range(1, len(events))):
        if type(events[i]) is type(events[i - 1]) is not ToolCallDelta:
            events[i - 1 : i + 1] = [type(events[i])(events[i - 1].text + events[i].text)]
    return events


def test_control_token_in_an_answer_is_a_tag_where_its_text_is_quoted() -> None:
    assert feed("a <think> b </think> c") == [TextDelta("a <think> b </think> c")]
    assert feed("a ", ("</think>",), "b") == [TextDelta("a b")]
    assert feed("a", ("<think>",), "b", ("</think>",), "c") == [
        TextDelta("a"),
        ThinkingDelta("b"),
        TextDelta("c"),
    ]


def test_control_token_ends_a_call_whose_value_is_open() -> None:
    opened = "<function=calc>\n<parameter=expression>\nprint('</tool_call>')"
    [event] = feed(("<tool_call>",), f"\n{opened}", ("</tool_call>",), tools=[CALC])
    assert event.call.arguments == {"expression": "print('</tool_call>')"}
    events = feed(
        ("<tool_call>",),
        f"{opened} ",
        ("<tool_call>",),
        CALC_HEAD[11:] + "1" + CALC_TAIL,
        tools=[CALC],
    )
    assert [event.call.arguments["expression"] for event in events] == [
        "print('</tool_call>') ",
        "1",
    ]


def test_tags_in_values_are_text_where_the_call_began_with_a_token() -> None:
    value = "<tool_call>\n</tool_call>\n</function>\n</tool_call>\n"
    body = CALC_HEAD[11:] + value + CALC_TAIL.removesuffix("</tool_call>")
    [event] = feed(("<tool_call>",), body, ("</tool_call>",), tools=[CALC])
    assert (event.call.arguments, event.problem) == ({"expression": value}, None)
    spoken = '\n{"name": "calc", "arguments": {"expression": "</tool_call>"}}\n'
    [event] = feed(("<tool_call>",), spoken, ("</tool_call>",), tools=[CALC])
    assert event.call.arguments == {"expression": "</tool_call>"}


def test_last_parameter_may_be_open_where_the_call_began_with_a_token() -> None:
    """Nemotron 3 Nano leaves the last `</parameter>` out at times."""
    [event] = feed(
        ("<tool_call>",), CALC_HEAD[11:] + "1\n</function>\n", ("</tool_call>",), tools=[CALC]
    )
    assert (event.call.arguments, event.problem) == ({"expression": "1"}, None)


def test_control_token_is_text_of_nothing_it_does_not_fit() -> None:
    assert feed("a<thi", ("<|im_start|>",), "nk>") == [TextDelta("a<thi<|im_start|>nk>")]
    assert feed("a<thi", ("</tool_call>",), "b", tools=[CALC]) == [TextDelta("a<thib")]
    events = feed(("</tool_call>",), starts_in_thinking=True, tools=[CALC])
    assert events == [ThinkingDelta("</tool_call>")]


def test_control_token_completes_an_unfinished_character() -> None:
    parser = ReplyParser(starts_in_thinking=True)
    parser.feed("é".encode()[:1])
    assert parser.feed(b"</think>", control=True) == [ThinkingDelta("\ufffd")]
    assert not parser.in_thinking


def test_control_token_after_a_call_is_no_text() -> None:
    call = CALC_HEAD + "1\n</parameter>\n</function>"
    events = feed(call, "\n", ("</tool_call>",), "\n", ("<tool_call>",), call[11:], tools=[CALC])
    assert [event.call.arguments for event in events] == [{"expression": "1"}] * 2


def test_nothing_follows_a_stop_string_that_is_a_control_token() -> None:
    assert feed("a", ("<tool_call>",), "b", ("</think>",), stop=["<tool_call>"]) == [TextDelta("a")]
