"""The grammars of calls, read by llguidance over a vocabulary of single bytes."""

from __future__ import annotations

from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from nanorun.chat.call_grammar import call_grammar, reply_grammar
from nanorun.model.chat import Grammar

BEGIN, END, EOS = 256, 257, 258


class Bytes:
    """A vocabulary of every byte, and the tokens that matter."""

    eos_token_id = EOS
    bos_token_id = None
    tokens = [*(bytes([i]) for i in range(256)), b"<tool_call>", b"</tool_call>", b"<|im_end|>"]  # noqa: RUF012
    special_token_ids = [BEGIN, END, EOS]  # noqa: RUF012

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    from llguidance import TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(Bytes()))


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
