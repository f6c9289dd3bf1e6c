"""The grammars of calls, read by llguidance over a vocabulary of single bytes."""

from __future__ import annotations

import random
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from nanorun.chat.call_grammar import call_grammar, reply_grammar
from nanorun.chat.parser import ReplyParser
from nanorun.chat.template import ChatTemplate
from nanorun.model.chat import Grammar, Message, ToolCall, ToolCallDelta
from tests.support.byte_tokens import byte_tokenizer

BEGIN, END, EOS = 256, 257, 258


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return byte_tokenizer(b"<tool_call>", b"</tool_call>", b"<|im_end|>")


def tool(name: str, properties: dict[str, Any], required: list[str] | None = None) -> Any:
    parameters = {"type": "object", "properties": properties, "required": required or []}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def tokens(text: str) -> list[int]:
    out: list[int] = []
    while text:
        for tag, token in (("<tool_call>", BEGIN), ("</tool_call>", END)):
            if text.startswith(tag):
                out.append(token)
                text = text[len(tag) :]
                break
        else:
            out += list(text[0].encode())
            text = text[1:]
    return out


def accepts(tokenizer: LLTokenizer, lark: str, text: str) -> bool:
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(lark), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    wanted = tokens(text)
    return matcher.try_consume_tokens(wanted) == len(wanted) and matcher.is_accepting()


def call(name: str, **arguments: str) -> str:
    body = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


WEATHER = tool(
    "get_weather",
    {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["c", "f"]}},
    ["city"],
)
PING = tool("ping", {})
TOKENS = {"call_tokens": (BEGIN, END)}


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (call("get_weather", city="Paris"), True),
        (call("get_weather", city="Paris\nTexas </parameter>"), True),
        (call("get_weather", city="Paris", days="3"), True),
        (call("get_weather", city="Paris", days="3", unit="c"), True),
        (call("get_weather", city="Paris", unit="f"), True),
        (call("ping"), True),
        (call("get_weather"), False),
        (call("get_weather", days="3"), False),
        (call("get_weather", city="Paris", days="three"), False),
        (call("get_weather", city="Paris", unit="k"), False),
        (call("get_weather", city="Paris", mood="good"), False),
        (call("launch"), False),
        ("It is sunny.", False),
    ],
)
def test_calls_fit_their_tools(tokenizer: LLTokenizer, text: str, good: bool) -> None:
    assert accepts(tokenizer, call_grammar([WEATHER, PING], **TOKENS), text) is good


def test_arguments_come_in_any_order_each_once(tokenizer: LLTokenizer) -> None:
    lark = call_grammar([WEATHER], **TOKENS)
    assert accepts(tokenizer, lark, call("get_weather", unit="c", city="Paris", days="3"))
    assert accepts(tokenizer, lark, call("get_weather", days="3", city="Paris"))
    twice = call("get_weather", city="Paris", days="3").replace(
        "</function>", "<parameter=days>\n4\n</parameter>\n</function>"
    )
    assert not accepts(tokenizer, lark, twice)


def test_many_parameters_come_in_any_order(tokenizer: LLTokenizer) -> None:
    names = [f"p{i}" for i in range(70)]  # more than are counted
    lark = call_grammar(
        [tool("f", {key: {"type": "integer"} for key in names}, names[60:])], **TOKENS
    )
    arguments = dict.fromkeys(reversed(names), "1")
    assert accepts(tokenizer, lark, call("f", **arguments))
    del arguments["p60"]
    assert not accepts(tokenizer, lark, call("f", **arguments))


def test_other_parameters_where_the_schema_lets_them(tokenizer: LLTokenizer) -> None:
    other = call("f", city="Paris", mood="good")
    for extra, good in ((None, False), (False, False), (True, True), ({"type": "integer"}, False)):
        offered = tool("f", {"city": {"type": "string"}}, ["city"])
        if extra is not None:
            offered["function"]["parameters"]["additionalProperties"] = extra
        lark = call_grammar([offered], **TOKENS)
        assert accepts(tokenizer, lark, other) is good
        assert not accepts(tokenizer, lark, call("f", mood="good"))
        is_number = isinstance(extra, dict)
        assert accepts(tokenizer, lark, call("f", city="Paris", n="1")) is (good or is_number)


def test_loose_tool_is_called_with_anything(tokenizer: LLTokenizer) -> None:
    lark = call_grammar([WEATHER, PING], **TOKENS, loose={"get_weather"})
    assert accepts(tokenizer, lark, call("get_weather", mood="good", days="three"))
    assert accepts(tokenizer, lark, call("get_weather"))
    assert not accepts(tokenizer, lark, call("ping", mood="good"))
    assert not accepts(tokenizer, lark, call("launch"))


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "boolean"}, ["true", "False"], ["TRUE", "1"]),
        ({"type": ["boolean", "null"]}, ["True", "None", "null"], ["none"]),
        ({"enum": ["a", 1, True]}, ["a", "1", "true", "True"], ['"a"', "2", "False"]),
        ({"type": "integer"}, ["-3"], ["True", "None"]),
    ],
)
def test_words_are_in_json_or_as_templates_write_them(
    tokenizer: LLTokenizer, schema: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    lark = call_grammar([tool("f", {"x": schema}, ["x"])], **TOKENS)
    assert [accepts(tokenizer, lark, call("f", x=value)) for value in good] == [True] * len(good)
    assert [accepts(tokenizer, lark, call("f", x=value)) for value in bad] == [False] * len(bad)


def test_words_of_a_call_are_text_where_they_are_no_tokens(tokenizer: LLTokenizer) -> None:
    lark = call_grammar([WEATHER], **TOKENS)
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(lark), log_level=0)
    spelled = list(b"</tool_call>")
    opened = tokens("<tool_call>\n<function=get_weather>\n<parameter=city>\n")
    assert matcher.try_consume_tokens(opened) == len(opened)
    assert matcher.try_consume_tokens(spelled) == len(spelled)
    assert matcher.try_consume_tokens([END]) == 0


VALUES: list[tuple[dict[str, Any], Any]] = [
    ({"type": "string"}, lambda pick: pick.choice(["", "a", "two\n\nlines\n", " <b>é</b> ", "1"])),
    ({"type": "integer"}, lambda pick: pick.randrange(-999, 999)),
    ({"type": "number"}, lambda pick: pick.choice([0.5, -2.25, 3.0, 1e-7])),
    ({"type": "boolean"}, lambda pick: pick.random() < 0.5),
    ({"type": "null"}, lambda pick: None),
    ({"enum": ["fast", "slow way"]}, lambda pick: pick.choice(["fast", "slow way"])),
    ({"type": ["integer", "null"]}, lambda pick: pick.choice([None, 7])),
    (
        {"type": "array", "items": {"type": "string"}},
        lambda pick: ["x", 'say "</parameter>"\n'][: pick.randrange(3)],
    ),
    (
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array"}}},
        lambda pick: {"a": 1, "b": [None, {"c": True}]},
    ),
]


@pytest.mark.parametrize("seed", range(200))
def test_what_the_template_writes_is_held_and_read_back(
    tokenizer: LLTokenizer, template: ChatTemplate, seed: int
) -> None:
    """A random tool, a call of it in any order: template, grammar, reader."""
    pick = random.Random(seed)
    kinds = {f"p-{i}": pick.choice(VALUES) for i in range(pick.randrange(7))}
    required = [name for name in kinds if pick.random() < 0.5]
    offered = tool("a.tool_1", {name: schema for name, (schema, _) in kinds.items()}, required)
    given = [name for name in kinds if name in required or pick.random() < 0.5]
    pick.shuffle(given)
    arguments = {name: kinds[name][1](pick) for name in given}
    said = Message("assistant", tool_calls=(ToolCall("1", "a.tool_1", arguments),))
    rendered = template.render([Message("user", "?"), said], tools=[offered], enable_thinking=False)
    text = rendered.text[rendered.text.rindex("<tool_call>") :]
    text = text[: text.rindex("</tool_call>") + len("</tool_call>")]
    assert accepts(tokenizer, call_grammar([offered], **TOKENS), text)
    parser = ReplyParser(starts_in_thinking=False, tools=[offered])
    events = [*parser.feed(text.encode()), *parser.finish()]
    [event] = [event for event in events if isinstance(event, ToolCallDelta)]
    assert (event.call.name, event.call.arguments) == ("a.tool_1", arguments)
    assert event.problem is None


def test_several_calls_only_where_they_are_wanted(tokenizer: LLTokenizer) -> None:
    two = call("ping") + "\n" + call("ping")
    for parallel in (True, False):
        lark = reply_grammar(None, [PING], parallel=parallel, **TOKENS)
        assert accepts(tokenizer, lark, call("ping"))
        assert accepts(tokenizer, lark, two) is parallel


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (Grammar("json_schema", '{"type": "integer"}'), "12", '"12"'),
        (Grammar("regex", r"\d{2}/\d{2}"), "12/34", "12-34"),
        (Grammar("regex", r"a\\/b"), r"a\/b", "a/b"),
        (Grammar("regex", "a\n/"), "a\n/", "a/"),
        (Grammar("lark", 'start: "yes" | NO\nNO: /no+/'), "nooo", "maybe"),
    ],
)
def test_answers_fit_their_grammar(
    tokenizer: LLTokenizer, grammar: Grammar, good: str, bad: str
) -> None:
    alone = reply_grammar(grammar, [], parallel=True, **TOKENS)
    assert accepts(tokenizer, alone, good)
    assert accepts(tokenizer, alone, "\n" + good)
    assert not accepts(tokenizer, alone, bad)
    with_tools = reply_grammar(grammar, [PING], parallel=True, **TOKENS)
    assert accepts(tokenizer, with_tools, good)
    assert accepts(tokenizer, with_tools, call("ping"))


def test_arguments_may_refer_to_shared_definitions(tokenizer: LLTokenizer) -> None:
    point = tool("move", {"to": {"$ref": "#/$defs/point"}}, ["to"])
    point["function"]["parameters"]["$defs"] = {
        "point": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
    }
    lark = call_grammar([point], **TOKENS)
    assert accepts(tokenizer, lark, call("move", to="[1, 2.5]"))
    assert not accepts(tokenizer, lark, call("move", to="[1]"))


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({}, "anything { at all"),
        ({"type": ["string", "null"]}, "text"),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "text"),
        ({"const": 'a "quoted" /word'}, 'a "quoted" /word'),
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, '{"a": 1}'),
    ],
)
def test_arguments_of_every_kind_can_be_said(
    tokenizer: LLTokenizer, schema: dict[str, Any], value: str
) -> None:
    lark = call_grammar([tool("f", {"x": schema}, ["x"])], **TOKENS)
    assert accepts(tokenizer, lark, call("f", x=value))
