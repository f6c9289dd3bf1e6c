"""A tool call with typed arguments, put together from what was read of it.

Whatever is wrong is said in `ParsedCall.problem`, with the text that could not be used in full:
nothing that a model wrote is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nanorun.chat.tool_values import (
    ToolSet,
    ToolSpec,
    load_json,
    value_from_json,
    value_from_text,
)

_NOT_A_CALL = "not a tool call"


@dataclass(frozen=True, slots=True)
class AroundCall:
    """Text that stood before a call or after it."""

    text: str
    end: int
    """Characters that the reader was given up to the end of the text."""


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of a tool on offer, whose arguments are still to come."""

    name: str


@dataclass(frozen=True, slots=True)
class CallText:
    """More of the JSON text of the arguments of the call that began."""

    text: str


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """A call of a tool, as far as it could be understood."""

    name: str
    """Name of the tool; empty if there is none."""
    arguments: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    is_whole: bool = True
    """Whether all of its arguments could be read."""


class CallDraft:
    """A call being put together.

    Args:
        name: The tool it names.
        tools: The tools on offer.
    """

    def __init__(self, name: str, tools: ToolSet) -> None:
        self.problems: list[str] = []
        self.arguments: dict[str, Any] = {}
        self._is_whole = True
        self._unused: list[str] = []
        found = tools.find(name)
        if found is None and tools:
            offered = ", ".join(tools.names)
            self.problems.append(f"no tool is called {name!r}; offered: {offered}")
        self.is_offered = found is not None
        self.spec = found or ToolSpec(name, {})

    def add_text(self, name: str, text: str) -> None:
        """An argument written as text."""
        self._add(name, value_from_text(text, self.spec, name))

    def add_json(self, name: str, value: Any) -> None:
        """An argument that came in a JSON object."""
        self._add(name, value_from_json(value, self.spec, name))

    def _add(self, name: str, result: tuple[Any, str | None]) -> None:
        """Add an argument; one that is there already stays what it is, as it may be out."""
        value, problem = result
        if name in self.arguments:
            if self.arguments[name] != value:
                self.problems.append(f"{name} is given twice, then as {value!r}")
            return
        if name not in self.spec.parameters and not self.spec.is_open:
            self.problems.append(f"{self.spec.name} has no parameter {name!r}")
        if problem:
            self.problems.append(f"{name}: {problem}")
        self.arguments[name] = value

    def add_unused(self, text: str) -> None:
        """Text of the call that is no argument."""
        if text.strip():
            self._unused.append(text.strip())

    def break_off(self, problem: str) -> None:
        """Say that there were more arguments than could be read."""
        self.problems.append(problem)
        self._is_whole = False

    def break_off_at(self, text: str) -> None:
        """Say that the text, which is all there is of the arguments, could not be read."""
        self.add_unused(text)
        self._is_whole = False

    def done(self) -> ParsedCall:
        """The call, with all that is wrong with it."""
        missing = [name for name in self.spec.required if name not in self.arguments]
        if missing:
            self.problems.append(f"{', '.join(missing)} missing")
        if self._unused:
            self.problems.append("text outside the parameters:\n" + "\n".join(self._unused))
        problem = "; ".join(self.problems) or None
        return ParsedCall(self.spec.name, self.arguments, problem, self._is_whole)


def calls_from_json(text: str, tools: ToolSet) -> list[ParsedCall]:
    """The calls in a JSON object, or in a list of them."""
    try:
        value = load_json(text.strip())
    except ValueError as error:
        return [unusable(text, f"{_NOT_A_CALL} ({error})")]
    entries = value if isinstance(value, list) else [value]
    return [_call_from_object(entry, text, tools) for entry in entries] or [unusable(text)]


def _call_from_object(entry: Any, text: str, tools: ToolSet) -> ParsedCall:
    """A call in the form `{"name": ..., "arguments": {...}}`; Llama's says "parameters"."""
    name = entry.get("name") if isinstance(entry, Mapping) else None
    if not isinstance(name, str) or not name.strip():
        return unusable(text)
    draft = CallDraft(name.strip(), tools)
    _add_arguments(draft, entry.get("arguments", entry.get("parameters", {})))
    return draft.done()


def _add_arguments(draft: CallDraft, arguments: Any) -> None:
    if isinstance(arguments, str):  # as OpenAI's own form has them, and so do endpoints
        try:
            arguments = load_json(arguments) if arguments.strip() else {}
        except ValueError:
            draft.break_off_at(arguments)
            return
    if isinstance(arguments, Mapping):
        for key, value in arguments.items():
            draft.add_json(key, value)
    elif arguments is not None:
        draft.break_off_at(str(arguments))


def unusable(text: str, what: str = _NOT_A_CALL) -> ParsedCall:
    """What stands for text that is no call."""
    if not text.strip():
        return ParsedCall("", problem="an empty tool call")
    return ParsedCall("", problem=f"{what}:\n{text.strip()}")


def begins_tag(text: str, tags: tuple[str, ...]) -> bool:
    """Whether a text is the beginning of a tag, or a whole one."""
    return any(tag.startswith(text) for tag in tags)


def without_closer(text: str, closer: str) -> str:
    """The text without a closing tag at its end, and the blanks around that."""
    stripped = text.rstrip()
    return stripped.removesuffix(closer) if stripped.endswith(closer) else text
