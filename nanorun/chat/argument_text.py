"""The JSON text of a call's arguments while their values are still being written.

Every character is looked at once, however long the value and however small the pieces.
"""

from __future__ import annotations

import json
import re
from enum import IntEnum
from typing import Any

_END_PARAMETER, _END_FUNCTION = "</parameter>", "</function>"
_to_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps makes an encoder each time
_UNIT = re.compile(rf"{_END_PARAMETER}|{_END_FUNCTION}|\n|[^\S\n]+|[^\s<]+|<")


class ArgumentsText:
    """Puts a JSON object together, argument by argument.

    What its methods return makes, in that order, what `json.dumps` makes of the whole but for the
    brace that ends it.
    """

    def __init__(self) -> None:
        self._before = "{"

    def begin_string(self, name: str) -> str:
        """An argument whose value is a string that is still to come."""
        return f'{self._key(name)}"'

    def string(self, text: str) -> str:
        """More of the string."""
        return _to_json(text)[1:-1]

    def end_string(self, text: str) -> str:
        """The rest of the string."""
        return f'{self.string(text)}"'

    def value(self, name: str, value: Any) -> str:
        """An argument with its value."""
        return f"{self._key(name)}{_to_json(value)}"

    def _key(self, name: str) -> str:
        before, self._before = self._before, ", "
        return f"{before}{_to_json(name)}: "


class _Held(IntEnum):
    """What the text so far ends with, that may turn out not to belong to the value."""

    NOTHING = 0
    LINE_BREAK = 1
    PARAMETER_END = 2
    FUNCTION_END = 3


_STAGES = {_END_PARAMETER: _Held.PARAMETER_END, _END_FUNCTION: _Held.FUNCTION_END}


class ValueText:
    r"""What is certain of a value that is written between the tags of a parameter.

    A line break at its beginning is not part of it. Held back is what may be its end, where tags
    may be left out or stand twice: `\n`, `</parameter>` and `</function>`, in this order and each
    of them optional, with white space after the tags. Tags must come whole.
    """

    def __init__(self) -> None:
        self._n_said = 0
        self._has_begun = False
        self._held: list[str] = []
        self._stage = _Held.NOTHING

    def add(self, text: str) -> str:
        """Read more of the value; returns what has become certain."""
        if text and not self._has_begun:
            self._has_begun = True
            text = text.removeprefix("\n")
        certain: list[str] = []
        for unit in _UNIT.findall(text):
            self._read(unit, certain)
        said = "".join(certain)
        self._n_said += len(said)
        return said

    def rest(self, value: str) -> str:
        """What was not said yet of the value, which is now complete."""
        return value[self._n_said :]

    def _read(self, unit: str, certain: list[str]) -> None:
        is_after_tag = self._stage >= _Held.PARAMETER_END
        if stage := _STAGES.get(unit):
            if stage <= self._stage:
                self._release_but_line_break(certain)
            self._hold(unit, stage)
        elif is_after_tag and unit.isspace():
            self._held.append(unit)
        else:
            self._release(certain)
            if unit == "\n":
                self._hold(unit, _Held.LINE_BREAK)
            else:
                certain.append(unit)

    def _hold(self, unit: str, stage: _Held) -> None:
        self._held.append(unit)
        self._stage = stage

    def _release(self, certain: list[str]) -> None:
        certain += self._held
        self._held.clear()
        self._stage = _Held.NOTHING

    def _release_but_line_break(self, certain: list[str]) -> None:
        line_break = self._held.pop() if self._held[-1] == "\n" else ""
        self._release(certain)
        if line_break:
            self._hold(line_break, _Held.LINE_BREAK)
