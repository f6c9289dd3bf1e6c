"""Reading a tool call as it streams in, with the slips that models make.

Nemotron's form is `<tool_call>`, `<function=NAME>`, any number of `<parameter=KEY>` value
`</parameter>`, `</function>`, `</tool_call>`; the older form of a JSON object between the outer
tags is read too. `ToolCallReader` finds out where a call ends while values may hold the very
tags that end it; `call_parsing` makes the call of what was read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from nanorun.chat.call_parsing import (
    ParsedCall,
    Part,
    call_from_head,
    call_from_parts,
    calls_from_json,
    join_parts,
)
from nanorun.chat.markup import CALL, END_CALL
from nanorun.chat.phrases import PhraseMatcher
from nanorun.chat.tool_values import ToolSet

_TAGS = (CALL, END_CALL, "<function", "</function>", "<parameter", "</parameter")
_TAGS_AFTER = (CALL, END_CALL, "<function", "</function>", "</parameter>")
_BLANK = re.compile(r"\s*")
_BLANK_OR_NOISE = re.compile(r"[\s`}\],]*")
"""What may stand after a JSON call without meaning anything: a surplus brace, a code fence."""
_FENCE = re.compile(r"[^\n]*\n?")

Phase = Literal["head", "tags", "json", "after"]


class ToolCallReader:
    """Reads the text after a `<tool_call>`, and further calls that follow at once.

    Feed it until `done`; what it found is in `items`: calls, and text that stood around them. A
    call is there as soon as its `</function>` or its last brace was read. Without tools on offer
    a text that does not begin like a call is not taken for one: the reader is then `refused`, and
    all it read is in `leftover`.
    """

    def __init__(self, tools: ToolSet) -> None:
        self.items: list[str | ParsedCall] = []
        self.done = False
        self.closed = False
        """Whether `</tool_call>` was read."""
        self.refused = False
        self.leftover = ""
        """Text read that belongs to what follows the call."""
        self._is_sure = False  # that this is a call: one was read
        self._tools = tools
        self._matcher = PhraseMatcher(_TAGS)
        self._steps: dict[Phase, Callable[[str, int], int]] = {
            "head": self._read_head,
            "tags": self._read_tags,
            "json": self._read_json,
            "after": self._read_after,
        }
        self._phase: Phase
        self._held: str  # after a call: what may be the beginning of a tag
        self._begin()

    def feed(self, text: str, start: int) -> int:
        """Read `text` from `start`; returns the offset after what was read."""
        i = start
        while i < len(text) and not self.done:
            i = self._steps[self._phase](text, i)
        return i

    def feed_control(self, tag: str) -> None:
        """Read `<tool_call>` or `</tool_call>` that came as a control token, so it is no text."""
        if self._phase == "after":
            if self._held:
                self.items.append(self._held)
            self._on_tag_after(tag)
            return
        if self._phase == "head":
            self._phase = "tags"
        self._matcher.reset()
        self._on_tag(tag, self._take_gap(), control=True)

    def finish(self) -> None:
        """The reply ends here, whatever is open."""
        if self.done:
            return
        if self._phase == "after":
            self.leftover = self._held
        elif self._may_refuse and self._phase != "json":
            self._refuse()
        else:
            self._close_part(self._take_gap())
            self._end_block(cut_off=True)
        self.done = True

    def _begin(self) -> None:
        """Start a block, as after `<tool_call>`."""
        self._phase = "head"
        self._gap: list[str] = []  # text since the last tag
        self._held = ""
        self._in_fence = False
        self._was_json = False
        self._begin_function()

    def _begin_function(self) -> None:
        self._parts: list[Part] = [Part("", "")]
        self._in_function = False
        self._in_value = False
        self._i_doubtful: int | None = None
        """Index of the first part whose tag would have ended the call but for an open value."""
        self._extent = JsonExtent()

    # --- before the call proper -------------------------------------------------------------

    def _read_head(self, text: str, i: int) -> int:
        """Skip blanks and a code fence, and find out in which form the call comes."""
        pattern = _FENCE if self._in_fence else _BLANK
        match = pattern.match(text, i)
        end = match.end() if match else i
        self._gap.append(text[i:end])
        if self._in_fence:
            self._in_fence = text[end - 1] != "\n"
        elif end < len(text):
            self._in_fence = text[end] == "`"
            if text[end] in "{[":
                self._phase = "json"
                self._was_json = True
            elif not self._in_fence:
                self._phase = "tags"
                if text[end] != "<" and self._may_refuse:
                    self._refuse()
        return end

    @property
    def _may_refuse(self) -> bool:
        """Whether what was read so far may turn out to be no call, but text."""
        return not self._tools and not self._is_sure and not self._in_function

    @property
    def _read_so_far(self) -> str:
        return "".join(self._gap).strip()

    def _refuse(self) -> None:
        self.done = self.refused = True
        self.leftover = join_parts(self._parts) + self._take_gap()

    # --- the tagged form --------------------------------------------------------------------

    def _read_tags(self, text: str, i: int) -> int:
        end, found = self._matcher.find(text, i)
        self._gap.append(text[i:end])
        if not found:
            if self._may_refuse and not "<function".startswith(self._read_so_far):
                self._refuse()
            return end
        self._matcher.reset()
        tag = found[0]
        if self._may_refuse and self._read_so_far != "<function":
            self._refuse()
        else:
            self._on_tag(tag, self._take_gap()[: -len(tag)], control=False)
        return end

    def _on_tag(self, tag: str, gap: str, *, control: bool) -> None:
        self._close_part(gap)
        if tag in (CALL, END_CALL):
            self._on_outer_tag(tag, gap, control=control)
            return
        if tag == "<function" and self._in_function and not self._in_value:
            self._end_function(cut_off=False)
        if tag == "<function" and self._i_doubtful is not None and self._follows_function(gap):
            self._end_block(cut_off=False)
        if tag == "</function>" and self._in_value and _at_line_start(gap):
            self._doubt()
        self._parts.append(Part(tag, ""))
        if self._phase == "json":
            return
        if tag == "<function":
            self._in_function = True
        elif tag == "<parameter":
            self._in_value = self._in_function
        elif tag == "</parameter":
            self._in_value = False
            self._i_doubtful = None
        elif tag == "</function>" and self._in_function and not self._in_value:
            self._end_function(cut_off=False)
            self._phase = "after"

    def _on_outer_tag(self, tag: str, gap: str, *, control: bool) -> None:
        """`<tool_call>` or `</tool_call>`, which may also be text of an open value.

        It is not if it stands on a line of its own, or right after `</function>`, or (for a new
        call) if the text had an end before.
        """
        in_value = self._extent.in_string if self._phase == "json" else self._in_value
        ends = control or not in_value or _at_line_start(gap) or self._follows_function(gap)
        if ends and (control or tag == END_CALL):
            self._i_doubtful = None
        if tag == END_CALL and not ends:
            self._doubt()
        elif tag == CALL and self._i_doubtful is not None:
            ends = True
        if not ends:
            self._parts.append(Part(tag, ""))
            return
        is_doubled = tag == CALL and not join_parts(self._parts).strip()
        if not is_doubled:
            self._end_block(cut_off=False)
        if tag == CALL:
            self._begin()
        else:
            self.done = self.closed = True

    def _follows_function(self, gap: str) -> bool:
        return self._parts[-1].tag == "</function>" and not gap.strip()

    def _doubt(self) -> None:
        if self._i_doubtful is None:
            self._i_doubtful = len(self._parts)

    # --- the JSON form ----------------------------------------------------------------------

    def _read_json(self, text: str, i: int) -> int:
        end, found = self._matcher.find(text, i)
        complete = self._extent.advance(text, i, end)
        if complete is not None:
            self._gap.append(text[i:complete])
            self._matcher.reset()
            self._close_part(self._take_gap())
            self._end_json(cut_off=False)
            self._begin_function()
            self._phase = "after"
            return complete
        self._gap.append(text[i:end])
        if found:
            self._matcher.reset()
            self._on_tag(found[0], self._take_gap()[: -len(found[0])], control=False)
        return end

    # --- after a call -----------------------------------------------------------------------

    def _read_after(self, text: str, i: int) -> int:
        """Skip blanks, and see whether the block ends, or another call follows."""
        if not self._held:
            match = (_BLANK_OR_NOISE if self._was_json else _BLANK).match(text, i)
            i = match.end() if match else i
            if i == len(text):
                return i
            if self._was_json and text[i] in "{[":
                self._phase = "json"
                return i
        held = self._held + text[i]
        if not any(tag.startswith(held) for tag in _TAGS_AFTER):
            self.leftover = self._held
            self.done = True
            return i
        self._held = held
        self._on_tag_after(held)
        return i + 1

    def _on_tag_after(self, tag: str) -> None:
        if tag == END_CALL:
            self.done = self.closed = True
        elif tag == CALL:
            self._begin()
        elif tag == "<function":
            self._begin()
            self._phase = "tags"
            self._on_tag(tag, "", control=False)
        elif tag in _TAGS_AFTER:  # a closing tag too many
            self._held = ""

    # --- ends -------------------------------------------------------------------------------

    def _take_gap(self) -> str:
        gap = "".join(self._gap)
        self._gap = []
        return gap

    def _close_part(self, gap: str) -> None:
        self._parts[-1] = Part(self._parts[-1].tag, gap)

    def _end_block(self, *, cut_off: bool) -> None:
        """Make calls of what was read; text after a doubtful end was text after all."""
        rest = ""
        if self._i_doubtful is not None:
            rest = join_parts(self._parts[self._i_doubtful :])
            rest = rest.removeprefix(self._parts[self._i_doubtful].tag).strip()
            self._parts = self._parts[: self._i_doubtful]
            cut_off = False
        if self._phase == "json":
            self._end_json(cut_off=cut_off)
        elif self._in_function:
            self._end_function(cut_off=cut_off)
        else:
            self._is_sure = True
            self.items.append(call_from_head(join_parts(self._parts), self._tools))
            self._begin_function()
        if rest:
            self.items.append(rest)

    def _end_function(self, *, cut_off: bool) -> None:
        self._is_sure = True
        head = self._parts[0].text.strip()
        if head and not head.startswith("`"):
            self.items.append(head)
        self.items.append(call_from_parts(self._parts[1:], self._tools, cut_off=cut_off))
        self._begin_function()

    def _end_json(self, *, cut_off: bool) -> None:
        self._is_sure = True
        self.items += calls_from_json(
            join_parts(self._parts), self._extent.missing, self._tools, cut_off=cut_off
        )


class JsonExtent:
    """Follows JSON text to the brace or bracket that closes it."""

    _IN_STRING = re.compile(r'["\\]')
    _OUTSIDE = re.compile(r'["{}\[\]]')

    def __init__(self) -> None:
        self.in_string = False
        self._escaped = False
        self._closers: list[str] = []

    @property
    def missing(self) -> str:
        """What would close all that is open."""
        return ('"' if self.in_string else "") + "".join(reversed(self._closers))

    def advance(self, text: str, start: int, end: int) -> int | None:
        """Read `text[start:end]`; returns the offset after the closing bracket, if it is there."""
        i = start
        while i < end:
            if self._escaped:
                self._escaped = False
                i += 1
                continue
            match = (self._IN_STRING if self.in_string else self._OUTSIDE).search(text, i, end)
            if match is None:
                return None
            i = match.end()
            if self._is_closed_by(match[0]):
                return i
        return None

    def _is_closed_by(self, char: str) -> bool:
        if char == "\\":
            self._escaped = True
        elif char == '"':
            self.in_string = not self.in_string
        elif char in "{[":
            self._closers.append("}" if char == "{" else "]")
        elif self._closers:
            self._closers.pop()
            return not self._closers
        return False


def _at_line_start(gap: str) -> bool:
    """Whether a tag after `gap` is the first thing on its line."""
    return gap.rstrip(" \t").endswith("\n")
