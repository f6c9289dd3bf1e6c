r"""The form of a reply as a grammar in llguidance's dialect of Lark.

Tool calls are written as Nemotron's template writes them, arguments in the order of their schema:

    <tool_call>\n<function=NAME>\n<parameter=K>\nVALUE\n</parameter>\n</function>\n</tool_call>

A string argument is raw text up to the closing tag; any other is JSON that fits its schema. The
dialect: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nanorun.chat.tool_values import ToolSpec
from nanorun.model.chat import Grammar

_CLOSE = "\n</parameter>\n"
# What may stand before an answer: the line breaks that templates put after `</think>`.
_GAP = "gap: /\\n{0,2}/"


def reply_grammar(
    answer: Grammar | None,
    tools: Sequence[Mapping[str, Any]],
    *,
    parallel: bool,
    call_tokens: tuple[int, int],
) -> str:
    """A whole reply after its thinking: an answer, calls, or either.

    Args:
        answer: What an answer must look like; None if there must be a call.
        tools: Tools that may be called, in OpenAI's form.
        parallel: Whether there may be several calls.
        call_tokens: Ids of `<tool_call>` and `</tool_call>`.
    """
    starts, rules = [], [_GAP]
    if answer is not None:
        starts.append("gap answer")
        rules.append(f"answer: {_answer(answer)}")
    if tools:
        starts.append("gap calls")
        rules.append(call_rules(tools, parallel=parallel, call_tokens=call_tokens))
    return "\n".join([f"start: {' | '.join(starts)}", *rules])


def call_grammar(tools: Sequence[Mapping[str, Any]], *, call_tokens: tuple[int, int]) -> str:
    """One call, beginning with `<tool_call>`."""
    rules = call_rules(tools, parallel=False, call_tokens=call_tokens)
    return f"start: calls\n{rules}"


def _answer(answer: Grammar) -> str:
    if answer.kind == "json_schema":
        return f"%json {answer.text}"
    if answer.kind == "regex":
        return f"/{_escape_slashes(answer.text)}/"
    return f"%lark {{\n{answer.text}\n}}"


def call_rules(
    tools: Sequence[Mapping[str, Any]], *, parallel: bool, call_tokens: tuple[int, int]
) -> str:
    """The rule `calls` and those it needs."""
    begin, end = call_tokens
    names = [f"function_{i}" for i in range(len(tools))]
    more = ' ("\\n" call)* /\\n?/' if parallel else ""
    rules = [
        f"calls: call{more}",
        f'call: <[{begin}]> "\\n" ({" | ".join(names)}) "</function>\\n" <[{end}]>',
    ]
    for name, tool in zip(names, tools, strict=True):
        rules += _function_rules(name, tool["function"])
    return "\n".join(rules)


def _function_rules(rule: str, function: Mapping[str, Any]) -> list[str]:
    spec = ToolSpec(function["name"], function.get("parameters") or {})
    shared = {key: spec.schema[key] for key in ("$defs", "definitions") if key in spec.schema}
    parts, rules = [], []
    for i, (name, schema) in enumerate(spec.parameters.items()):
        argument = f"{rule}_{i}"
        parts.append(argument if name in spec.required else f"{argument}?")
        rules += _argument_rules(argument, name, schema, shared)
    head = _literal(f"<function={spec.name}>\n")
    return [f"{rule}: {' '.join([head, *parts])}", *rules]


def _argument_rules(rule: str, name: str, schema: Any, shared: Mapping[str, Any]) -> list[str]:
    head = _literal(f"<parameter={name}>\n")
    choices = _string_choices(schema)
    if choices is not None:
        values = " | ".join(_literal(choice) for choice in choices)
        return [f"{rule}: {head} ({values}) {_literal(_CLOSE)}"]
    if _takes_strings(schema):
        return [
            f"{rule}: {head} {rule}_text",
            f"{rule}_text[suffix={_literal(_CLOSE)}]: /(?s:.*)/",
        ]
    full = {**schema, **shared} if isinstance(schema, Mapping) else schema
    return [
        f"{rule}: {head} {rule}_json {_literal(_CLOSE)}",
        f"{rule}_json: %json {json.dumps(full)}",
    ]


def _string_choices(schema: Any) -> list[str] | None:
    """The values of a string that may only be one of a few."""
    if not isinstance(schema, Mapping):
        return None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and values and all(isinstance(v, str) for v in values):
        return values
    return None


def _takes_strings(schema: Any) -> bool:
    """Whether an argument is, or may be, raw text."""
    if not isinstance(schema, Mapping):
        return True
    kinds = schema.get("type")
    if kinds is not None:
        return "string" in (kinds if isinstance(kinds, list) else [kinds])
    options = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(options, list):
        return any(_takes_strings(option) for option in options)
    return not ({"$ref", "enum", "const", "allOf", "properties", "items"} & set(schema))


def _literal(text: str) -> str:
    """A string of the dialect; its escapes are JSON's."""
    return json.dumps(text, ensure_ascii=False)


def _escape_slashes(pattern: str) -> str:
    """The pattern between slashes; what is escaped already stays."""
    return re.sub(r"(\\.)|/", lambda match: match[1] or "\\/", pattern, flags=re.DOTALL)
