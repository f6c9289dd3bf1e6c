"""From the text of a tool call to a call with typed arguments.

Whatever is wrong is said in `ParsedCall.problem`, with the text that could not be used in full:
nothing that a model wrote is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanorun.chat.tool_values import (
    ToolSet,
    ToolSpec,
    load_json,
    value_from_json,
    value_from_text,
)

_NAME = re.compile(r"""\s*(?:[=:]|name\s*=)\s*["']?([^>"'\n<{]*)["']?[^\S\n]*>?""")
"""What follows `<function` or `<parameter`; tolerates quotes, a `name=` attribute, a lost `>`."""
_TAG_END = re.compile(r"\s*>")
_NAME_THEN_JSON = re.compile(r"\s*(?:`+\w*\s+)?([\w.-]+)\s*[:(]?\s*(?=\{)")
_CALL_KEYS = ("name", "function", "type", "id")
_NOT_A_CALL = "not a tool call"


@dataclass(frozen=True, slots=True)
class Part:
    """A tag (without what follows its name) and the text up to the next one."""

    tag: str
    text: str


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """A call of a tool, as far as it could be understood."""

    name: str
    """Name of the tool; empty if there is none."""
    arguments: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def join_parts(parts: Sequence[Part]) -> str:
    """The text that was cut into parts."""
    return "".join(part.tag + part.text for part in parts)


class _Draft:
    """A call being put together."""

    def __init__(self, name: str, tools: ToolSet) -> None:
        self._tools = tools
        self.problems: list[str] = []
        self.arguments: dict[str, Any] = {}
        self._unused: list[str] = []
        found = tools.find(name)
        if found is None and tools:
            offered = ", ".join(tools.names)
            self.problems.append(f"no tool is called {name!r}; offered: {offered}")
        self.spec = found or ToolSpec(name, {})

    def add_text(self, name: str, text: str) -> None:
        """An argument written as text."""
        self._add(name, value_from_text(text, self.spec, name))

    def add_json(self, name: str, value: Any) -> None:
        """An argument that came in a JSON object."""
        self._add(name, value_from_json(value, self.spec, name))

    def _add(self, name: str, result: tuple[Any, str | None]) -> None:
        value, problem = result
        if self.arguments.get(name, value) != value:
            self.problems.append(f"{name} is given twice, first as {self.arguments[name]!r}")
        if name not in self.spec.parameters and not self.spec.is_open:
            self.problems.append(f"{self.spec.name} has no parameter {name!r}")
        if problem:
            self.problems.append(f"{name}: {problem}")
        self.arguments[name] = value

    def add_unused(self, text: str) -> None:
        """Text of the call that is no argument."""
        if text.strip():
            self._unused.append(text.strip())

    def done(self) -> ParsedCall:
        """The call, with all that is wrong with it."""
        missing = [name for name in self.spec.required if name not in self.arguments]
        if missing:
            self.problems.append(f"{', '.join(missing)} missing")
        if self._unused:
            self.problems.append("text outside the parameters:\n" + "\n".join(self._unused))
        return ParsedCall(self.spec.name, self.arguments, "; ".join(self.problems) or None)


def call_from_parts(parts: Sequence[Part], tools: ToolSet, *, cut_off: bool) -> ParsedCall:
    """The call in `<function=...>` and what follows it.

    Args:
        parts: The parts from `<function` on.
        tools: The tools on offer.
        cut_off: Whether the reply ended here, before the call did.
    """
    head = _NAME.match(parts[0].text)
    name = head[1].strip() if head else ""
    if head is None or not name:
        return _unusable(join_parts(parts))
    draft = _Draft(name, tools)
    body = parts[0].text[head.end() :]
    if not _add_json_body(draft, body, parts):
        draft.add_unused(body)
        _ParameterReader(draft, parts[1:]).read()
    if cut_off:
        draft.problems.append("the reply ends within the call")
    return draft.done()


def _add_json_body(draft: _Draft, body: str, parts: Sequence[Part]) -> bool:
    """Take the arguments from a JSON object in place of parameters, if there is one."""
    if not body.lstrip().startswith("{") or any(part.tag == "<parameter" for part in parts):
        return False
    text = body + join_parts([part for part in parts[1:] if part.tag != "</function>"])
    try:
        arguments = load_json(text)
    except ValueError:
        return False
    for name, value in arguments.items():
        draft.add_json(name, value)
    return True


class _ParameterReader:
    """Reads the parameters of a call; a value ends where its tag ends it for sure."""

    def __init__(self, draft: _Draft, parts: Sequence[Part]) -> None:
        self._draft = draft
        self._parts = parts
        self._name: str | None = None
        self._value: list[str] = []
        ends = [i for i, part in enumerate(parts) if part.tag == "</parameter"]
        self._i_last_end = ends[-1] if ends else -1

    def read(self) -> None:
        """Put all parameters into the draft."""
        for i, part in enumerate(self._parts):
            if self._name is None:
                self._read_between(part)
            elif not self._ends_value(i, part):
                self._value.append(part.tag + part.text)
        if self._name is not None:
            self._end_value()

    def _read_between(self, part: Part) -> None:
        if part.tag == "<parameter":
            self._open(part)
        elif part.tag in ("</parameter", "</function>"):
            self._draft.add_unused(_after_tag(part))
        else:
            self._draft.add_unused(part.tag + part.text)

    def _open(self, part: Part) -> None:
        match = _NAME.match(part.text)
        if match is None or not match[1].strip():
            self._draft.add_unused(part.tag + part.text)
            return
        self._name = match[1].strip()
        self._value = [part.text[match.end() :]]

    def _ends_value(self, i: int, part: Part) -> bool:
        """End the open value if `part` does so, and start what it starts."""
        if part.tag == "</parameter" and self._is_end(i, part):
            self._end_value()
            self._draft.add_unused(_after_tag(part))
        elif part.tag == "<parameter" and self._is_next_parameter(part):
            self._end_value()
            self._open(part)
        elif part.tag == "</function>" and i == len(self._parts) - 1 and not part.text.strip():
            self._end_value()
        else:
            return False
        return True

    def _is_end(self, i: int, part: Part) -> bool:
        """Whether `</parameter>` ends the value, and is not part of it (of XML, for example)."""
        after = _after_tag(part)
        own_line = self._value[-1].endswith("\n") and after.startswith("\n")
        return own_line or self._is_compact or not after.strip() or i == self._i_last_end

    @property
    def _is_compact(self) -> bool:
        """Whether the value begins right after its tag; then its end is no line of its own."""
        return not self._value[0].startswith(("\n", "\r\n"))

    def _is_next_parameter(self, part: Part) -> bool:
        """Whether `<parameter=...>` starts another parameter because `</parameter>` was lost."""
        match = _NAME.match(part.text)
        name = match[1].strip() if match else ""
        is_new = name != self._name and name not in self._draft.arguments
        at_line_start = self._is_compact or self._value[-1].endswith("\n")
        return is_new and name in self._draft.spec.parameters and at_line_start

    def _end_value(self) -> None:
        text = "".join(self._value).removeprefix("\r").removeprefix("\n")
        if self._name is not None:
            self._draft.add_text(self._name, text.removesuffix("\n").removesuffix("\r"))
        self._name = None


def _after_tag(part: Part) -> str:
    """The text after a closing tag, whose `>` may be part of it."""
    match = _TAG_END.match(part.text) if part.tag == "</parameter" else None
    return part.text[match.end() :] if match else part.text


def calls_from_json(text: str, missing: str, tools: ToolSet, *, cut_off: bool) -> list[ParsedCall]:
    """The calls in a JSON object, or in a list of them.

    Args:
        text: The JSON text.
        missing: What would close its open brackets; tried where the reply was not cut off.
        tools: The tools on offer.
        cut_off: Whether the reply ended here.
    """
    text = text.strip().strip("`").strip()
    text = text.removeprefix("json").lstrip()
    try:
        value = load_json(text if cut_off else text + missing)
    except ValueError as error:
        return [_unusable(text, f"{_NOT_A_CALL} ({error})")]
    entries = value if isinstance(value, list) else [value]
    return [_call_from_object(entry, text, tools) for entry in entries] or [_unusable(text)]


def _call_from_object(entry: Any, text: str, tools: ToolSet) -> ParsedCall:
    if not isinstance(entry, Mapping):
        return _unusable(text)
    if isinstance(entry.get("function"), Mapping):
        entry = entry["function"]
    name = entry.get("name", entry.get("function"))
    beside = {key: value for key, value in entry.items() if key not in _CALL_KEYS}
    arguments = entry.get("arguments", entry.get("parameters", beside))
    if name is None and len(entry) == 1:
        [(key, value)] = entry.items()  # {"calculator": {"expression": "1+1"}}
        if tools.find(key) is not None:
            name, arguments = key, value
    if not isinstance(name, str) or not name.strip():
        return _unusable(text)
    draft = _Draft(name.strip(), tools)
    _add_arguments(draft, arguments)
    return draft.done()


def _add_arguments(draft: _Draft, arguments: Any) -> None:
    if isinstance(arguments, str):  # as OpenAI's own form has them
        try:
            arguments = load_json(arguments) if arguments.strip() else {}
        except ValueError:
            draft.add_unused(arguments)
            return
    if isinstance(arguments, Mapping):
        for name, value in arguments.items():
            draft.add_json(name, value)
    elif arguments is not None:
        draft.add_unused(str(arguments))


def call_from_head(text: str, tools: ToolSet) -> ParsedCall:
    """The call in a block without tags and not in JSON: a name and a JSON object, or nothing."""
    match = _NAME_THEN_JSON.match(text)
    if match is None or (tools and tools.find(match[1]) is None):
        return _unusable(text)
    try:
        arguments = load_json(text[match.end() :].strip().rstrip("`);").strip())
    except ValueError:
        return _unusable(text)
    draft = _Draft(match[1], tools)
    _add_arguments(draft, arguments)
    return draft.done()


def _unusable(text: str, what: str = _NOT_A_CALL) -> ParsedCall:
    if not text.strip():
        return ParsedCall("", problem="an empty tool call")
    return ParsedCall("", problem=f"{what}:\n{text.strip()}")
