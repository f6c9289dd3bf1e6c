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

from nanorun.chat.schema.document import read_schema_text
from nanorun.chat.schema.holding import Held, Holder, hold
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
        return f"%json {json.dumps(hold(read_schema_text(answer.text)).schema)}"
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
    name = function["name"]
    holder = Holder(function.get("parameters") or {})
    properties, required = holder.parameters(f"tool {name}")
    parts, rules = [], []
    for i, (parameter, schema) in enumerate(properties.items()):
        if schema is False and parameter not in required:
            continue
        argument = f"{rule}_{i}"
        parts.append(argument if parameter in required else f"{argument}?")
        held = holder.hold(schema, f"tool {name}.{parameter}")
        rules += _argument_rules(argument, parameter, held)
    head = _literal(f"<function={name}>\n")
    return [f"{rule}: {' '.join([head, *parts])}", *rules]


def _argument_rules(rule: str, name: str, schema: Held) -> list[str]:
    head = _literal(f"<parameter={name}>\n")
    choices = schema.choices
    if choices and all(isinstance(choice, str) for choice in choices):
        values = " | ".join(_literal(choice) for choice in choices)
        return [f"{rule}: {head} ({values}) {_literal(_CLOSE)}"]
    if schema.takes_strings:
        return [
            f"{rule}: {head} {rule}_text",
            f"{rule}_text[suffix={_literal(_CLOSE)}]: /(?s:.*)/",
        ]
    return [
        f"{rule}: {head} {rule}_json {_literal(_CLOSE)}",
        f"{rule}_json: %json {json.dumps(schema.schema)}",
    ]


def _literal(text: str) -> str:
    """A string of the dialect; its escapes are JSON's."""
    return json.dumps(text, ensure_ascii=False)


def _escape_slashes(pattern: str) -> str:
    """The pattern between slashes; what is escaped already stays."""
    return re.sub(r"(\\.)|/", lambda match: match[1] or "\\/", pattern, flags=re.DOTALL)
