"""Reading a tool call as it streams in.

Nemotron's form is `<tool_call>`, `<function=NAME>`, any number of `<parameter=KEY>` value
`</parameter>`, `</function>`, `</tool_call>`; the JSON object that Hermes and the older Nemotron
write between the outer tags is read too. Calls held by `call_grammar` are written like that; the
others come with these slips, each of which somebody saw a model make:

- no `<tool_call>` before `<function=`: ollama issues 16686 and 17353 (`ReplyParser` opens a call);
- no `</parameter>` at the last parameter, by Nemotron 3 Nano itself: llama.cpp pull request 18077;
  between parameters, and no `</function>`: ollama pull request 17914, vLLM's qwen3_coder parser;
- no `</tool_call>`, and several functions in one `<tool_call>`: vLLM's qwen3_coder parser;
- no `>` after a name: vLLM pull request 25028.

Values may hold the very tags: one that begins on a line of its own ends with a `</parameter>` on
a line of its own, after which the call goes on or ends.

The JSON text of the arguments is told as it becomes certain: a string while it is written, any
other value when its parameter ends. A call of a tool that is not on offer, and one in the JSON
form, which a later character may show to be none, is told when it is complete.
"""

from __future__ import annotations

import re

from nanorun.chat.argument_text import ArgumentsText, ValueText
from nanorun.chat.call_parsing import (
    AroundCall,
    CallBegins,
    CallDraft,
    CallText,
    ParsedCall,
    begins_tag,
    calls_from_json,
    unusable,
    without_closer,
)
from nanorun.chat.markup import CALL, END_CALL
from nanorun.chat.tool_values import ToolSet, is_plain_text

_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"
_TAGS = (CALL, END_CALL, _FUNCTION, _END_FUNCTION, _PARAMETER, _END_PARAMETER)
_AFTER_VALUE = (CALL, END_CALL, _FUNCTION, _END_FUNCTION, _PARAMETER)
_N_LONGEST = max(map(len, _TAGS))
_OUTSIDE = re.compile(f"{CALL}|{END_CALL}|{_FUNCTION}")
_IN_FUNCTION = re.compile(f"{CALL}|{END_CALL}|{_FUNCTION}|{_END_FUNCTION}|{_PARAMETER}")
_IN_VALUE = re.compile(f"{_END_PARAMETER}|{_PARAMETER}|{END_CALL}")
_NAME = re.compile(r"([^<>\n]{0,256})(?:>|(?=\n))")
_NAME_SO_FAR = re.compile(r"[^<>\n]{0,256}")
_QUOTE = re.compile(r'\\.|"', re.DOTALL)
_MOST_BLANKS = 64
"""Between a `</parameter>` and the tag that shows it to be one."""
_N_CHUNK = 4096


class ToolCallReader:
    """Reads the text after a `<tool_call>`, and further calls that follow at once.

    Feed it until `done`; what it found is in `items`: text that stood around calls, and calls.
    Before a call may come that it begins, and pieces of its arguments.

    Args:
        tools: The tools on offer.
        by_token: Whether the call began with a control token; `<tool_call>` and `</tool_call>` in
            its values are then text, wherever they stand.
    """

    def __init__(self, tools: ToolSet, *, by_token: bool = False) -> None:
        self.items: list[AroundCall | CallBegins | CallText | ParsedCall] = []
        self.done = False
        self.leftover = ""
        """Text read that belongs to what follows the call."""
        self._tools = tools
        self._by_token = by_token
        self._n_given = 0  # characters, control tokens included
        self._rest = ""  # not decided yet: it begins with a tag, or may be the beginning of one
        self._at_end = False  # nothing follows the rest
        self._draft: CallDraft | None = None
        self._json: ArgumentsText | None = None  # of a call that has begun
        self._name = ""  # of the open parameter
        self._value: ValueText | None = None  # of the open parameter, if it is told as it comes
        self._begin()

    def _begin(self) -> None:
        """Start a block, as after `<tool_call>`."""
        self._text: list[str] = []  # read since the last tag
        self._begun = self._in_string = False
        self._step = self._read_head

    def feed(self, text: str, start: int) -> int:
        """Read `text` from `start`; returns the offset after what was read."""
        i = start
        while i < len(text) and not self.done:
            chunk = text[i : i + _N_CHUNK]
            i += len(chunk)
            self._n_given += len(chunk)
            self._rest += chunk
            self._run()
            if self.done:
                n_back = min(len(self._rest), len(chunk))
                self.leftover += self._rest[: len(self._rest) - n_back]
                i -= n_back
        return i

    def feed_control(self, tag: str) -> None:
        """Read `<tool_call>` or `</tool_call>` that came as a control token, so it is no text."""
        self._close(cut_off=False)
        self._n_given += len(tag)
        if tag == CALL:
            self._by_token = True
            self._begin()
        else:
            self.done = True

    def finish(self) -> None:
        """The reply ends here, whatever is open."""
        if self.done:
            return
        self._close(cut_off=True)
        self.done = True

    def _run(self) -> None:
        while not self.done and self._step():
            pass

    def _next_tag(self, tags: re.Pattern[str]) -> str | None:
        """The next tag, with which the rest then begins; None if there is none yet."""
        match = tags.search(self._rest)
        self._move(match.start() if match else self._n_certain())
        return match[0] if match else None

    def _n_certain(self) -> int:
        """Characters of the rest that cannot be the beginning of a tag."""
        i = self._rest.rfind("<", max(0, len(self._rest) - _N_LONGEST))
        is_beginning = i >= 0 and not self._at_end and begins_tag(self._rest[i:], _TAGS)
        return i if is_beginning else len(self._rest)

    def _move(self, n_chars: int) -> None:
        """Take characters of the rest for text."""
        if n_chars:
            text, self._rest = self._rest[:n_chars], self._rest[n_chars:]
            self._text.append(text)
            if self._json is not None and self._value is not None:
                self._tell(self._json.string(self._value.add(text)))

    def _skip(self, n_chars: int) -> None:
        self._rest = self._rest[n_chars:]

    def _take_text(self) -> str:
        text, self._text = "".join(self._text), []
        return text

    # --- before the call proper -------------------------------------------------------------

    def _read_head(self) -> bool:
        """Find out in which form the call comes; text before it is passed on."""
        if not self._begun:
            self._move(len(self._rest) - len(self._rest.lstrip()))
            if not self._rest:
                return False
            self._begun = True
            if self._rest[0] in "{[":
                self._step = self._read_json
                return True
        tag = self._next_tag(_OUTSIDE)
        if tag is None:
            return False
        if tag == _FUNCTION:
            return self._open_function()
        if tag == END_CALL or self._has_text:
            self.items.append(unusable(self._take_text()))
        self._step = self._read_after
        return True

    @property
    def _has_text(self) -> bool:
        return any(text.strip() for text in self._text)

    def _open_function(self) -> bool:
        n_before = self._n_given - len(self._rest)
        name = self._read_name(_FUNCTION)
        if name is None:
            return False
        if not name:
            self._step = self._read_head
            self._begun = True
            self._move(len(_FUNCTION))
            return True
        if self._has_text:
            text = self._take_text()
            n_blanks = len(text) - len(text.rstrip())
            self.items.append(AroundCall(text.strip(), n_before - n_blanks))
        self._text.clear()
        self._draft = CallDraft(name, self._tools)
        self._json = ArgumentsText() if self._draft.is_offered else None
        if self._json is not None:
            self.items.append(CallBegins(self._draft.spec.name))
        self._step = self._read_between
        return True

    def _read_name(self, tag: str) -> str | None:
        """The name in the tag that the rest begins with, read; "" if there is none.

        None if more of it is to come.
        """
        match = _NAME.match(self._rest, len(tag))
        if match is None:
            so_far = _NAME_SO_FAR.match(self._rest, len(tag))
            is_whole = so_far is None or so_far.end() < len(self._rest)
            return "" if is_whole or self._at_end else None
        name = match[1].strip()
        if name:
            self._skip(match.end())
        return name

    # --- the JSON form ----------------------------------------------------------------------

    def _read_json(self) -> bool:
        """Go on to the `</tool_call>` that is not in a string."""
        match = None if self._by_token else re.search(END_CALL, self._rest)
        end = match.start() if match else self._n_certain()
        if match is None and not self._at_end and self._rest[:end].endswith("\\"):
            end = len(self._rest[:end].rstrip("\\"))  # with what it escapes
        for quote in _QUOTE.finditer(self._rest, 0, end):
            self._in_string ^= quote[0] == '"'
        self._move(end)
        if match is None:
            return False
        if self._in_string and not self._at_line_start:
            self._move(len(END_CALL))
        else:
            self._end_json()
        return True

    def _end_json(self) -> None:
        self.items += calls_from_json(self._take_text(), self._tools)
        self._step = self._read_after

    # --- a function -------------------------------------------------------------------------

    def _read_between(self) -> bool:
        """Read between parameters."""
        assert self._draft is not None
        tag = self._next_tag(_IN_FUNCTION)
        if tag is None:
            return False
        if tag == _PARAMETER:
            name = self._read_name(_PARAMETER)
            if name is None:
                return False
            if not name:
                self._move(len(_PARAMETER))
                return True
            self._draft.add_unused(self._take_text())
            self._begin_value(self._draft, name)
            return True
        if tag == _END_FUNCTION:
            self._skip(len(tag))
        self._end_function()
        return True

    def _end_function(self) -> None:
        assert self._draft is not None
        self._draft.add_unused(self._take_text())
        self.items.append(self._draft.done())
        self._draft = self._json = None
        self._step = self._read_after

    def _begin_value(self, draft: CallDraft, name: str) -> None:
        self._name = name
        self._step = self._read_value
        if self._json is None or name in draft.arguments:
            return
        if is_plain_text(draft.spec, name):
            self._value = ValueText()
            self._tell(self._json.begin_string(name))

    def _tell(self, text: str) -> None:
        """Pass on more of the arguments' JSON text."""
        if text:
            self.items.append(CallText(text))

    def _read_value(self) -> bool:
        tag = self._next_tag(_IN_VALUE)
        if tag is None:
            return False
        ends = self._ends_value(tag)
        if ends is None:
            return False
        if not ends:
            self._move(len(tag))
            return True
        if tag == _END_PARAMETER:
            self._skip(len(tag))
            self._end_value()
        else:
            self._end_open_value()
        return True

    def _ends_value(self, tag: str) -> bool | None:
        """Whether the tag ends the value, and is not part of it; None if what follows says."""
        own_line = self._at_line_start or self._is_compact
        if tag == END_CALL:
            return own_line and not self._by_token
        if not own_line:
            return False
        return self._goes_on() if tag == _END_PARAMETER else self._is_next_parameter()

    def _goes_on(self) -> bool | None:
        """Whether the call goes on, or ends, after the `</parameter>` here."""
        after = self._rest[len(_END_PARAMETER) :]
        tag = after.lstrip()
        if tag.startswith(_AFTER_VALUE) or (self._at_end and not tag):
            return True
        may_go_on = len(after) - len(tag) <= _MOST_BLANKS and begins_tag(tag, _AFTER_VALUE)
        return None if may_go_on and not self._at_end else False

    def _is_next_parameter(self) -> bool | None:
        """Whether `<parameter=...>` is another parameter of the tool: `</parameter>` is missing."""
        assert self._draft is not None
        rest = self._rest
        name = self._read_name(_PARAMETER)
        self._rest = rest
        if name is None:
            return None
        is_new = name != self._name and name not in self._draft.arguments
        return is_new and name in self._draft.spec.parameters

    @property
    def _at_line_start(self) -> bool:
        return bool(self._text) and self._text[-1].endswith("\n")

    @property
    def _is_compact(self) -> bool:
        """Whether the value begins right after its tag; then its end is no line of its own."""
        return not self._text or not self._text[0].startswith("\n")

    def _end_open_value(self, *, cut_off: bool = False) -> bool:
        """End a value whose `</parameter>` is missing.

        Args:
            cut_off: Whether the reply ends here.

        Returns:
            Whether that is within the value: not even `</function>` ends it.
        """
        text = self._take_text()
        inner = without_closer(text, _END_FUNCTION)
        cut_off = cut_off and inner == text
        self._text = [without_closer(inner, _END_PARAMETER)]
        self._end_value(cut_off=cut_off)
        return cut_off

    def _end_value(self, *, cut_off: bool = False) -> None:
        assert self._draft is not None
        text = self._take_text().removeprefix("\n").removesuffix("\n")
        is_new = self._name not in self._draft.arguments
        self._draft.add_text(self._name, text)
        if self._json is not None and is_new and not cut_off:
            if self._value is not None:
                self._tell(self._json.end_string(self._value.rest(text)))
            else:
                self._tell(self._json.value(self._name, self._draft.arguments[self._name]))
        self._value = None
        self._step = self._read_between

    # --- ends -------------------------------------------------------------------------------

    def _read_after(self) -> bool:
        """See whether the block ends, or another call follows."""
        self._rest = self._rest.lstrip()
        if self._rest.startswith(END_CALL):
            self._skip(len(END_CALL))
            self.done = True
        elif self._rest.startswith(CALL):
            self._skip(len(CALL))
            self._begin()
            return True
        elif self._rest.startswith(_FUNCTION):
            return self._open_function()
        elif not self._at_end:
            self.done = bool(self._rest) and not begins_tag(self._rest, _AFTER_VALUE[:3])
        return False

    def _close(self, *, cut_off: bool) -> None:
        """End whatever is open."""
        self._at_end = True
        self._run()
        self._move(len(self._rest))
        if self._step == self._read_value:
            cut_off = self._end_open_value(cut_off=cut_off)
        if self._draft is not None:
            if cut_off:
                self._draft.break_off("the reply ends within the call")
            self._end_function()
        elif self._step == self._read_json:
            self._end_json()
        elif self._step == self._read_head:
            self.items.append(unusable(self._take_text()))
        elif self._has_text:
            self.items.append(AroundCall(self._take_text(), self._n_given))
        self._at_end = False
