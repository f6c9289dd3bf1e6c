"""The arguments of a call that come as the JSON text of an object, told while they come.

An endpoint's JSON may be spaced and escaped in any way, and its values may not be of the types
that the tool asks for. So what is told is not what came, but what `json.dumps` will make of the
arguments once they are read: strings while they come, other values when they are complete.
"""

from __future__ import annotations

import re

from nanorun.chat.argument_text import ArgumentsText
from nanorun.chat.tool_values import ToolSpec, is_plain_text, load_json, value_from_json

_BLANKS = " \t\n\r"
_KEY = re.compile(r'("(?:[^"\\]|\\.)*")\s*:\s*(?=\S)', re.DOTALL)
_MOST_KEY_CHARS = 1024
_CHARACTERS = re.compile(
    r'(?:[^"\\]|\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*"
)
_MARK = re.compile(r'\\.|["{}\[\],]', re.DOTALL)


class JsonArguments:
    """Reads the object; stops telling at the first thing that JSON does not have.

    Args:
        spec: The tool that is called.
    """

    def __init__(self, spec: ToolSpec) -> None:
        self._spec = spec
        self._told = ArgumentsText()
        self._certain: list[str] = []
        self._rest = ""
        self._key = ""
        self._seen: set[str] = set()
        self._step = self._read_opening
        self._n_scanned = 0  # of the rest, in search of the end of a value
        self._depth = 0
        self._in_string = False

    def add(self, text: str) -> str:
        """Read more of the text; returns what has become certain of the arguments' JSON text."""
        self._rest += text
        while self._step():
            pass
        certain = "".join(self._certain)
        self._certain.clear()
        return certain

    def _stop(self) -> bool:
        """Tell no more."""
        self._step = self._stop
        self._rest = ""
        return False

    def _read_opening(self) -> bool:
        return self._read_mark("{")

    def _read_comma(self) -> bool:
        return self._read_mark(",")

    def _read_mark(self, mark: str) -> bool:
        """Go past the mark, which a key follows."""
        self._rest = self._rest.lstrip(_BLANKS)
        if not self._rest:
            return False
        if not self._rest.startswith(mark):
            return self._stop()
        self._rest = self._rest.removeprefix(mark)
        self._step = self._read_key
        return True

    def _read_key(self) -> bool:
        self._rest = self._rest.lstrip(_BLANKS)
        match = _KEY.match(self._rest)
        if match is None:
            may_come = self._rest[:1] in ("", '"') and len(self._rest) <= _MOST_KEY_CHARS
            return False if may_come else self._stop()
        try:
            self._key = load_json(match[1])
        except ValueError:
            return self._stop()
        if self._key in self._seen:
            return self._stop()
        self._seen.add(self._key)
        self._rest = self._rest[match.end() :]
        self._begin_value()
        return True

    def _begin_value(self) -> None:
        if self._rest[0] == '"' and is_plain_text(self._spec, self._key):
            self._rest = self._rest[1:]
            self._certain.append(self._told.begin_string(self._key))
            self._step = self._read_string
        else:
            self._n_scanned = self._depth = 0
            self._in_string = False
            self._step = self._read_value

    def _read_string(self) -> bool:
        match = _CHARACTERS.match(self._rest)
        assert match is not None  # it matches nothing, too
        text = load_json(f'"{match[0]}"')
        self._rest = self._rest[match.end() :]
        if self._rest.startswith('"'):
            self._rest = self._rest[1:]
            self._certain.append(self._told.end_string(text))
            self._step = self._read_comma
            return True
        self._certain.append(self._told.string(text))
        is_escape_begun = len(self._rest) < len(r"\ud83d\ude00")
        return False if is_escape_begun else self._stop()

    def _read_value(self) -> bool:
        """Go on to the comma or brace after the value."""
        end = self._end_of_value()
        if end is None:
            return False
        try:
            value, _ = value_from_json(load_json(self._rest[:end].strip()), self._spec, self._key)
        except ValueError:
            return self._stop()
        self._rest = self._rest[end:]
        self._certain.append(self._told.value(self._key, value))
        self._step = self._read_comma
        return True

    def _end_of_value(self) -> int | None:
        is_escaping = self._rest.endswith("\\")
        n_whole = len(self._rest.rstrip("\\")) if is_escaping else len(self._rest)
        for match in _MARK.finditer(self._rest, self._n_scanned, n_whole):
            mark = match[0]
            if mark == '"':
                self._in_string = not self._in_string
            elif self._in_string or mark[0] == "\\":
                continue
            elif self._depth == 0 and mark in ",}":
                return match.start()
            else:
                self._depth += (mark in "{[") - (mark in "}]")
        self._n_scanned = max(self._n_scanned, n_whole)
        return None
