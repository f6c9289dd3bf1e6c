r"""The form of a reply as a grammar in llguidance's dialect of Lark.

Tool calls are written as Nemotron's template writes them, arguments in any order:

    <tool_call>\n<function=NAME>\n<parameter=K>\nVALUE\n</parameter>\n</function>\n</tool_call>

A string argument is raw text up to the closing tag; any other is JSON that fits its schema. The
dialect: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md

Every argument is given at most once and the required ones exactly once, by a rule with a set of
bits for a parameter (docs/parametric.md there): llguidance makes only the states that a reply
goes through, so 20 parameters cost 20 alternatives and not 20! orders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nanorun.chat.schema.document import read_schema_text
from nanorun.chat.schema.holding import Held, Holder, hold
from nanorun.errors import UsageError
from nanorun.model.chat import Grammar

_CLOSE = "\n</parameter>\n"
# What may stand before an answer: the line breaks that templates put after `</think>`.
_GAP = "gap: /\\n{0,2}/"
_N_BITS = 64
"""Parameters that a rule can count; of those beyond, a call may give any number."""
_PYTHON = {"boolean": ("True", "False"), "null": ("None",)}
"""Nemotron's template writes such a value with `value | string`, so models do it too."""


def reply_grammar(
    answer: Grammar | None,
    tools: Sequence[Mapping[str, Any]],
    *,
    parallel: bool,
    call_tokens: tuple[int, int],
    loose: Collection[str] = (),
) -> str:
    """A whole reply after its thinking: an answer, calls, or either.

    Args:
        answer: What an answer must look like; None if there must be a call.
        tools: Tools that may be called, in OpenAI's form.
        parallel: Whether there may be several calls.
        call_tokens: Ids of `<tool_call>` and `</tool_call>`.
        loose: Names of tools whose arguments may be anything.

    Raises:
        UsageError: If the schema of the answer or of a tool has no meaning, or is too large.
    """
    starts, rules = [], [_GAP]
    if answer is not None:
        starts.append("gap answer")
        rules.append(f"answer: {_answer(answer)}")
    if tools:
        more = ' ("\\n" call)* /\\n?/' if parallel else ""
        starts.append("gap calls")
        rules += [f"calls: call{more}", _call_rules(tools, call_tokens, loose)]
    return "\n".join([f"start: {' | '.join(starts)}", *rules])


def call_grammar(
    tools: Sequence[Mapping[str, Any]],
    *,
    call_tokens: tuple[int, int],
    loose: Collection[str] = (),
) -> str:
    """One call, beginning with `<tool_call>`; arguments as for `reply_grammar`.

    Raises:
        UsageError: If the schema of a tool has no meaning, or is too large.
    """
    return f"start: call\n{_call_rules(tools, call_tokens, loose)}"


def _answer(answer: Grammar) -> str:
    if answer.kind == "json_schema":
        return f"%json {json.dumps(hold(read_schema_text(answer.text)).schema)}"
    if answer.kind == "regex":
        return f"/{_escape_slashes(answer.text)}/"
    return f"%lark {{\n{answer.text}\n}}"


def _call_rules(
    tools: Sequence[Mapping[str, Any]], call_tokens: tuple[int, int], loose: Collection[str]
) -> str:
    """The rule `call` and those it needs."""
    begin, end = call_tokens
    names = [f"function_{i}" for i in range(len(tools))]
    rules = [f'call: <[{begin}]> "\\n" ({" | ".join(names)}) "</function>\\n" <[{end}]>']
    for rule, tool in zip(names, tools, strict=True):
        function = tool["function"]
        if function["name"] in loose:
            rules += _loose_rules(rule, function["name"])
        else:
            rules += _function_rules(rule, function)
    return "\n".join(rules)


def _loose_rules(rule: str, name: str) -> list[str]:
    """A call of the tool with any arguments at all."""
    other = f"{rule}_other"
    head = _literal(f"<function={name}>\n")
    return [f"{rule}: {head} {other}*", *_other_rules(other, (), Held({}))]


def _function_rules(rule: str, function: Mapping[str, Any]) -> list[str]:
    name = function["name"]
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise UsageError(f"tool {name}: parameters is {parameters!r}; it must be a schema")
    holder = Holder(dict(parameters))
    properties, required = holder.parameters(f"tool {name}")
    optional = [key for key, schema in properties.items() if schema is not False]
    names = [*dict.fromkeys(required), *(key for key in optional if key not in required)]
    rules, arguments = [], f"{rule}_arguments"
    n_counted = min(len(set(required)), _N_BITS)
    alternatives = [f'"" %if is_ones([0:{n_counted}])' if n_counted else '""']
    for i, parameter in enumerate(names):
        argument = f"{rule}_{i}"
        held = holder.hold(properties[parameter], f"tool {name}.{parameter}")
        rules += _argument_rules(argument, _literal(f"<parameter={parameter}>\n"), held)
        alternatives.append(_counted(argument, arguments, i))
    extra = holder.additional(f"tool {name}")
    if extra is not None:
        rules += _other_rules(f"{rule}_other", properties, extra)
        alternatives.append(f"{rule}_other {arguments}::_")
    head = _literal(f"<function={name}>\n")
    if len(alternatives) == 1:
        return [f"{rule}: {head}"]
    return [f"{rule}: {head} {arguments}::0", f"{arguments}::_: {' | '.join(alternatives)}", *rules]


def _counted(argument: str, arguments: str, i: int) -> str:
    """The argument and what may follow it: any that was not given yet."""
    if i >= _N_BITS:
        return f"{argument} {arguments}::_"
    return f"{argument} {arguments}::set_bit({i}) %if bit_clear({i})"


def _other_rules(rule: str, known: Collection[str], schema: Held) -> list[str]:
    """An argument of any other name."""
    but = f" & ~({' | '.join(map(_literal, known))})" if known else ""
    head = rule.upper()
    named = f'{head}: "<parameter=" (/[^<>\\n]+/{but}) ">\\n"'
    return [named, *_argument_rules(rule, head, schema)]


def _argument_rules(rule: str, head: str, schema: Held) -> list[str]:
    """An argument that begins with `head`, its value and its end."""
    if schema.choices:
        values = [spelling for choice in schema.choices for spelling in _spellings(choice)]
    elif schema.takes("string"):
        return [
            f"{rule}: {head} {rule}_text",
            f"{rule}_text[suffix={_literal(_CLOSE)}]: /(?s:.*)/",
        ]
    else:
        values = [word for kind, words in _PYTHON.items() if schema.takes(kind) for word in words]
    options = [_literal(value) for value in values]
    rules = []
    if not schema.choices:
        options.append(f"{rule}_json")
        rules.append(f"{rule}_json: %json {json.dumps(schema.schema)}")
    return [f"{rule}: {head} ({' | '.join(options)}) {_literal(_CLOSE)}", *rules]


def _spellings(value: Any) -> list[str]:
    """A value as templates write it: a string as it is, others in JSON or in Python's words."""
    if isinstance(value, str):
        return [value]
    python = [str(value)] if value is None or isinstance(value, bool) else []
    return [json.dumps(value, ensure_ascii=False), *python]


def _literal(text: str) -> str:
    """A string of the dialect; its escapes are JSON's."""
    return json.dumps(text, ensure_ascii=False)


def _escape_slashes(pattern: str) -> str:
    """The pattern between slashes; what is escaped already stays."""
    return re.sub(r"(\\.)|/", lambda match: match[1] or "\\/", pattern, flags=re.DOTALL)
