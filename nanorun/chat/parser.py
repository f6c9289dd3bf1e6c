"""From the bytes a model emits to thinking, answer and tool calls, as they stream.

Tags may come as control tokens or spelled out of ordinary ones, whole or in pieces; text that may
still become a tag or a stop string is held back until it is decided. How the bytes are cut never
changes what comes out.
"""

from __future__ import annotations

import codecs
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from nanorun.chat.call_events import CallEvents, unread
from nanorun.chat.call_parsing import AroundCall, CallBegins, CallText, ParsedCall
from nanorun.chat.markup import CALL, END_CALL, END_THINK, THINK
from nanorun.chat.origins import Origins
from nanorun.chat.phrases import PhraseMatcher
from nanorun.chat.tool_calls import ToolCallReader
from nanorun.chat.tool_values import ToolSet
from nanorun.model.chat import Event, TextDelta, ThinkingDelta, ToolArguments

_THINKING_TAGS = frozenset({THINK, END_THINK})
_CALL_TAGS = frozenset({CALL, END_CALL})
_NEWLINES = re.compile(r"\n*")
_BLANK = re.compile(r"\s*")

_Mode = Literal["thinking", "answer", "call", "over"]


class ReplyParser:
    """Parses one reply.

    Thinking and answer come without their tags, the line breaks before them and the white space
    after them. A `<tool_call>` ends thinking. Text after a tool call is answer again, a blank
    line apart from the text before it.

    Where no tools are on offer there are no calls: their tags are text, in the thinking too, which
    then ends with its own tag alone.

    A `<think>` at the beginning of the answer is a tag, and so is a `</think>` in it, which some
    models write twice; further on `<think>` is text, as is the `</think>` that follows it: the
    answer quotes them. As control tokens they are always tags.

    Args:
        starts_in_thinking: Whether the prompt ended with an open `<think>`.
        tools: The tools on offer, in OpenAI's form; they give arguments their types. Without any,
            what looks like a call is text.
        stop: Texts that end the answer, the first to be complete; none of it comes out.
            Thinking and tool calls are not searched.
        continues: Whether the prompt ended in the middle of the thinking or answer: white space is
            then kept from the beginning, and tags are no longer at it.
        id_prefix: What the ids of tool calls start with; random by default.
    """

    def __init__(
        self,
        *,
        starts_in_thinking: bool,
        tools: Iterable[Mapping[str, Any]] = (),
        stop: Sequence[str] = (),
        continues: bool = False,
        id_prefix: str | None = None,
    ) -> None:
        self.stopped_by: str | None = None
        """The stop string that ended the answer."""
        self.n_tool_calls = 0
        """Tool calls so far, unusable ones included."""
        self.origins = Origins()
        """Which characters of the reply came out as text."""
        self._tools = ToolSet(tools)
        self._stops = frozenset(filter(None, stop))
        self._tags = _THINKING_TAGS | _CALL_TAGS if self._tools else _THINKING_TAGS
        self._openers: frozenset[str] = frozenset()
        if self._tools:
            self._openers = frozenset({CALL, *(f"<function={name}>" for name in self._tools.names)})
        self._id_prefix = f"call_{secrets.token_hex(6)}_" if id_prefix is None else id_prefix
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._thinking_tags = PhraseMatcher(self._tags - {END_CALL})
        self._answer_tags = PhraseMatcher([*self._stops, *self._openers, *self._tags])
        self._events: list[Event] = []
        self._reader: ToolCallReader | None = None
        self._n_before_call = 0  # characters before what the reader was given
        self._call: CallEvents | None = None  # that has begun
        self._n_begun = 0
        self._mode: _Mode
        self._matcher: PhraseMatcher
        self._pending: str  # text that may be the beginning of a phrase
        self._skip: re.Pattern[str] | None  # what is left out before the text begins
        self._blanks: list[tuple[int, str]]  # white space at the end of the text, and where it is
        self._has_text: bool
        self._has_answered = False
        self._follows_call = False
        """Whether the text to come must be set apart from text before a call."""
        self._n_quoted = 0
        """Opening tags that were text of the answer, and await their closing tags."""
        self._enter("thinking" if starts_in_thinking else "answer")
        if continues:
            self._skip = None
            self._has_text = True
            self._has_answered = not starts_in_thinking

    @property
    def in_thinking(self) -> bool:
        """Whether the model is thinking."""
        return self._mode == "thinking"

    @property
    def in_call(self) -> bool:
        """Whether the text is within a tool call, or what may become one."""
        return self._reader is not None

    @property
    def has_answered(self) -> bool:
        """Whether there was any answer: text, a tool call, or what may become one."""
        in_call = self._reader is not None
        return self._has_answered or bool(self.n_tool_calls) or in_call or bool(self._pending)

    @property
    def n_settled(self) -> int:
        """Characters from the beginning that came out or never will."""
        if self._mode == "over":
            return self.origins.n_read
        if self._blanks:
            return self._blanks[0][0]
        if self._reader is not None:
            return self._n_before_call
        return self.origins.n_read - len(self._pending)

    def feed(self, piece: bytes, *, control: bool = False) -> list[Event]:
        """Read the next bytes of the reply.

        Args:
            piece: The bytes, cut anywhere.
            control: Whether they are the text of one control token. Only needed to tell a
                `</think>` in the middle of an answer from the same text quoted there.

        Returns:
            What has become certain: thinking, answer text, tool calls.
        """
        if control and (tag := piece.decode("utf-8", "replace")) in self._tags:
            self._consume(self._decoder.decode(b"", True))
            self._consume_control(tag)
        else:
            self._consume(self._decoder.decode(piece))
        return self._take_events()

    def finish(self) -> list[Event]:
        """Say that the reply is over; returns what was held back."""
        self._consume(self._decoder.decode(b"", True))
        if self._reader is not None:
            self._reader.finish()
            self._drain(self._reader)
        if self._mode in ("thinking", "answer"):
            self._release(self._pending)
        self._mode = "over"
        return self._take_events()

    # --- reading ----------------------------------------------------------------------------

    def _consume(self, text: str) -> None:
        i = 0
        while i < len(text) and self._mode != "over":
            if self._reader is not None:
                end = self._reader.feed(text, i)
                self.origins.n_read += end - i
                self._drain(self._reader)
            else:
                end = self._read_text(text, i)
            i = end

    def _read_text(self, text: str, i: int) -> int:
        """Read thinking or answer up to the next tag; returns the offset after it."""
        start = i
        if self._skip is not None and not self._pending:
            match = self._skip.match(text, i)
            i = match.end() if match else i
        end, found = self._matcher.find(text, i)
        run = self._pending + text[i:end]
        phrase = self._meant(found, run)
        n_kept = len(run) - (len(phrase) if phrase else self._matcher.n_held)
        self._pending = "" if phrase else run[n_kept:]
        self.origins.n_read += end - start
        self._release(run[:n_kept], len(run) - n_kept)
        if phrase:
            self._matcher.reset()
            self._on_phrase(phrase)
        return end

    def _meant(self, found: tuple[str, ...], run: str) -> str | None:
        """The phrase at the end of `run` that counts: a stop string, or a tag that is no text."""
        if not found:
            return None
        if self._mode == "answer":
            stops = [phrase for phrase in found if phrase in self._stops]
            if stops:
                return stops[0]
        tag = next((p for p in found if p in self._tags or p in self._openers), None)
        return None if tag is None or self._is_quoted(tag, run[: -len(tag)]) else tag

    def _is_quoted(self, tag: str, before: str) -> bool:
        """Whether a tag in the answer is something it writes about."""
        if self._mode != "answer" or tag in self._openers:
            return False
        if tag == THINK:
            quoted = self._has_text or bool(before.strip())
            self._n_quoted += quoted
            return quoted
        quoted = tag == END_THINK and self._n_quoted > 0
        self._n_quoted -= quoted
        return quoted

    def _consume_control(self, tag: str) -> None:
        if self._mode == "over":
            return
        if self._reader is not None:
            self.origins.n_read += len(tag)
            if tag in (CALL, END_CALL):
                self._reader.feed_control(tag)
            else:
                self._reader.feed(tag, 0)
            self._drain(self._reader)
            return
        pending, self._pending = self._pending, ""
        self._matcher.reset()
        self._release(pending)
        self.origins.n_read += len(tag)
        if self.in_thinking and tag == END_CALL:
            self._release(tag)
        else:
            self._on_phrase(tag, control=True)

    def _on_phrase(self, phrase: str, *, control: bool = False) -> None:
        if phrase in self._stops and self._mode == "answer":
            self.stopped_by = phrase
            self._mode = "over"
        elif phrase in self._openers:
            self._open_call(phrase, control=control)
        elif phrase == THINK and not self.in_thinking:
            self._enter("thinking")
        elif phrase == END_THINK and self.in_thinking:
            self._enter("answer")
        else:  # a stray tag
            if not self._has_text:
                self._skip = _NEWLINES
                self._blanks.clear()

    # --- tool calls -------------------------------------------------------------------------

    def _open_call(self, opener: str, *, control: bool) -> None:
        self._mode = "call"
        self._reader = ToolCallReader(self._tools, by_token=control)
        self._n_before_call = self.origins.n_read
        if opener != CALL:
            self._n_before_call -= len(opener)
            self._reader.feed(opener, 0)

    def _drain(self, reader: ToolCallReader) -> None:
        """Pass on what the reader found, and go on with text when it is done."""
        for item in reader.items:
            match item:
                case CallText(text) if self._call is not None:
                    self._events.append(self._call.add(text))
                case CallBegins(name):
                    self._enter("call")
                    self._begin_call(name)
                case ParsedCall():
                    self._enter("call")
                    self._complete_call(item)
                case AroundCall(text, end):
                    self._enter("call")
                    self._release(text, self.origins.n_read - self._n_before_call - end)
        reader.items.clear()
        if not reader.done:
            return
        self._reader = None
        self._enter("answer")
        self._skip = _BLANK
        self._follows_call = self._has_answered
        self.origins.n_read -= len(reader.leftover)
        self._consume(reader.leftover)

    def _begin_call(self, name: str) -> CallEvents:
        self._call = CallEvents(self._n_begun, self._next_id, name)
        self._n_begun += 1
        self._events.append(self._call.begun())
        return self._call

    def _complete_call(self, parsed: ParsedCall) -> None:
        if parsed.name:
            call = self._call or self._begin_call(parsed.name)
            self._events += call.complete(parsed)
        else:
            self._events.append(unread(self._n_begun, self._next_id, parsed))
        self._call = None
        self.n_tool_calls += 1

    @property
    def _next_id(self) -> str:
        return f"{self._id_prefix}{self.n_tool_calls}"

    # --- text -------------------------------------------------------------------------------

    def _enter(self, mode: _Mode) -> None:
        """Begin a stretch of thinking or answer."""
        self._mode = mode
        self._matcher = self._thinking_tags if mode == "thinking" else self._answer_tags
        self._matcher.reset()
        self._pending = ""
        self._skip = _NEWLINES
        self._blanks = []
        self._has_text = False
        self._follows_call = False
        self._n_quoted = 0

    def _release(self, text: str, n_after: int = 0) -> None:
        """Pass on text that is certain, but for the white space it ends with.

        Args:
            text: The text.
            n_after: Characters read after it.
        """
        if not text:
            return
        self._skip = None
        start = self.origins.n_read - n_after - len(text)
        body = text.rstrip()
        if not body:
            self._blanks.append((start, text))
            return
        parts = [*self._blanks, (start, body)]
        for place, part in parts:
            self.origins.note(place, len(part), in_thinking=self.in_thinking)
        self._emit("".join([part for _, part in parts]))
        n_body = len(body)
        self._blanks = [(start + n_body, text[n_body:])] if n_body < len(text) else []

    def _emit(self, text: str) -> None:
        if self.in_thinking:
            self._events.append(ThinkingDelta(text))
        else:
            self._events.append(TextDelta(f"\n\n{text}" if self._follows_call else text))
            self._has_answered = True
        self._follows_call = False
        self._has_text = True

    def _take_events(self) -> list[Event]:
        """The events since the last call, neighbours of one kind joined."""
        taken, self._events = self._events, []
        if len(taken) < 2:
            return taken
        events: list[Event] = []
        for event in taken:
            last = events[-1] if events else None
            if isinstance(event, TextDelta) and isinstance(last, TextDelta):
                events[-1] = TextDelta(last.text + event.text)
            elif isinstance(event, ThinkingDelta) and isinstance(last, ThinkingDelta):
                events[-1] = ThinkingDelta(last.text + event.text)
            elif isinstance(event, ToolArguments) and isinstance(last, ToolArguments):
                events[-1] = ToolArguments(event.index, last.text + event.text)
            else:
                events.append(event)
        return events
