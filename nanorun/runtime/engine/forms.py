"""What a request's options ask of the form of its reply, compiled for the model's vocabulary.

Where tools are offered and the model writes calls as Nemotron does, every call is held to the
tools' names and schemas from its `<tool_call>` on. That token is what begins a call: text that
only spells it is not held.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanorun.chat.call_grammar import call_grammar, reply_grammar
from nanorun.errors import ModelError, UsageError
from nanorun.model.chat import GenerateOptions
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.reply.constraint import Form
from nanorun.runtime.reply.grammar import MakeMatcher

_CALL_MARK = "<function="
"""What a template shows that asks for calls in this form."""


@dataclass(frozen=True, slots=True)
class CompiledForm:
    """What holds replies, and what their reader should know of it."""

    form: Form | None
    notices: tuple[str, ...] = ()


FREE = CompiledForm(None)


@dataclass(frozen=True, slots=True)
class _Grammar:
    """A compiled grammar, and what of the form it does not hold."""

    make: MakeMatcher | None
    notices: tuple[str, ...] = ()


def needs_form(options: GenerateOptions) -> bool:
    """Whether `compile_form` has anything to do."""
    asked = options.grammar is not None or options.tool_choice == "required"
    return asked or bool(options.tools)


def compile_form(model: LoadedModel, options: GenerateOptions) -> CompiledForm:
    """The form that a reply is to have, if any; may take a second, in any thread.

    A tool whose schema cannot be held is called freely, with a notice, unless the request insists:
    by `strict` or `tool_choice` "required".

    Raises:
        UsageError: If a grammar has no meaning, or a call is required and there are no tools.
        ModelError: If a call must be held and the model writes calls in another form.
    """
    must_call = options.tool_choice == "required"
    if must_call and not options.tools:
        raise UsageError("a tool call is required, but there are no tools")
    free_text = options.grammar is None and not must_call
    held_anyway = not free_text or bool(_insisted(options))
    if not needs_form(options) or not (held_anyway or _speaks(model)):
        return FREE
    grammar = model.grammars.cached(_key(options), lambda: _compile(model, options))
    if grammar.make is None:
        return CompiledForm(None, grammar.notices)
    call_token = model.call_tokens[0] if options.tools else -1
    if free_text:
        only_one = not options.parallel_tool_calls
        form = Form(call=grammar.make, call_token=call_token, ends_with_call=only_one)
    else:
        form = Form(reply=grammar.make, call_token=call_token)
    return CompiledForm(form, grammar.notices)


def _speaks(model: LoadedModel) -> bool:
    """Whether the model writes calls in the form of `call_grammar`."""
    try:
        return bool(model.call_tokens) and _CALL_MARK in model.template.source
    except ModelError:
        return False


def _insisted(options: GenerateOptions) -> list[str]:
    """Names of the tools whose calls must be held, or the request is refused."""
    must_call = options.tool_choice == "required"
    functions = [tool["function"] for tool in options.tools]
    return [function["name"] for function in functions if must_call or function.get("strict")]


def _key(options: GenerateOptions) -> str:
    """All of the options that the form depends on."""
    answer = options.grammar and [options.grammar.kind, options.grammar.text]
    asked = [answer, options.tools, options.tool_choice, options.parallel_tool_calls]
    return json.dumps(asked)


def _compile(model: LoadedModel, options: GenerateOptions) -> _Grammar:
    """The whole form, or as much of it as can be held where the request does not insist."""
    try:
        return _Grammar(_matcher(model, options, {}))
    except UsageError as error:
        insisted = _insisted(options)
        if not options.tools or len(insisted) == len(options.tools):
            raise
        reasons = _refused(model, options.tools, insisted)
        whole = _reason(error)
    if not reasons:  # each can be held, but not all together
        reasons = {name: whole for name in _names(options.tools) if name not in insisted}
    try:
        return _Grammar(_matcher(model, options, reasons), _notices(reasons))
    except UsageError:
        if options.grammar is not None or insisted:
            raise
        return _Grammar(None, _notices(dict.fromkeys(_names(options.tools), whole)))


def _matcher(model: LoadedModel, options: GenerateOptions, loose: Mapping[str, str]) -> MakeMatcher:
    tokens = model.call_tokens if options.tools else (-1, -1)
    if options.grammar is None and options.tool_choice != "required":
        lark = call_grammar(options.tools, call_tokens=tokens, loose=loose)
        return model.grammars.compile(lark, may_break=not _insisted(options))
    lark = reply_grammar(
        options.grammar, options.tools, parallel=options.parallel_tool_calls, call_tokens=tokens,
        loose=loose,
    )  # fmt: skip
    return model.grammars.compile(lark)


def _refused(
    model: LoadedModel, tools: Sequence[Mapping[str, Any]], insisted: Sequence[str]
) -> dict[str, str]:
    """Tools that cannot be held even alone, by name, with the reason.

    Raises:
        UsageError: If one of them must be.
    """
    reasons: dict[str, str] = {}
    for tool in tools:
        try:
            model.grammars.compile(call_grammar([tool], call_tokens=model.call_tokens))
        except UsageError as error:
            name = tool["function"]["name"]
            if name in insisted:
                raise
            reasons[name] = _reason(error)
    return reasons


def _reason(error: UsageError) -> str:
    return "; ".join([error.message, *error.facts[:1]])


def _names(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    return [tool["function"]["name"] for tool in tools]


def _notices(reasons: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(
        f"calls of {name} are not held to its parameters: {reason}"
        for name, reason in reasons.items()
    )
