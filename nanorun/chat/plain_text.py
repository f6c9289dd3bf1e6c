"""From the bytes a model emits after a raw prompt to text, as they stream: nothing is read from it.

Only the thinking is told apart, where the prompt ended with an open `<think>`: then everything up
to the `</think>` is thinking.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from nanorun.chat.markup import END_THINK
from nanorun.chat.origins import Origins
from nanorun.chat.phrases import PhraseMatcher
from nanorun.model.chat import Event, TextDelta, ThinkingDelta


class PlainParser:
    """Parses one reply to a raw prompt; has what `ReplyParser` has.

    Text comes with its white space and whatever tags it spells, up to the first stop string.
    Thinking comes without the line breaks before it and the white space after it, and the text
    after thinking without the line breaks before it.

    Args:
        starts_in_thinking: Whether the prompt ended with an open `<think>`.
        stop: Texts that end the text, the first to be complete; none of it comes out. Thinking is
            not searched.
    """

    n_tool_calls = 0
    in_call = False

    def __init__(self, *, starts_in_thinking: bool, stop: Sequence[str] = ()) -> None:
        self.stopped_by: str | None = None
        """The stop string that ended the text."""
        self.in_thinking = starts_in_thinking
        """Whether the model is thinking."""
        self.has_answered = False
        """Whether there was any text."""
        self.origins = Origins()
        """Which characters of the reply came out as text."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = PhraseMatcher(stop)
        self._matcher = PhraseMatcher([END_THINK]) if starts_in_thinking else self._stops
        self._pending = ""
        """Text that may be the beginning of a phrase."""
        self._blanks = ""
        """White space at the end of the thinking so far."""
        self._skips_newlines = starts_in_thinking
        self._events: list[Event] = []

    @property
    def n_settled(self) -> int:
        """Characters from the beginning that came out or never will."""
        return self.origins.n_read - len(self._pending) - len(self._blanks)

    def feed(self, piece: bytes, *, control: bool = False) -> list[Event]:
        """Read the next bytes of the reply, cut anywhere; what has become certain of its text.

        Args:
            piece: The bytes.
            control: Whether they are the text of one control token, which makes no difference.
        """
        self._consume(self._decoder.decode(piece))
        return self._take_events()

    def finish(self) -> list[Event]:
        """Say that the reply is over; returns what was held back."""
        self._consume(self._decoder.decode(b"", True))
        if self.stopped_by is None:
            self._release(self._pending)
        self._pending = self._blanks = ""
        return self._take_events()

    def _consume(self, text: str) -> None:
        i = 0
        while i < len(text) and self.stopped_by is None:
            i = self._read(text, i)

    def _read(self, text: str, i: int) -> int:
        """Read up to the next phrase; returns the offset after it."""
        end, found = self._matcher.find(text, i)
        run = self._pending + text[i:end]
        n_kept = len(run) - (len(found[0]) if found else self._matcher.n_held)
        self._pending = "" if found else run[n_kept:]
        self.origins.n_read += end - i
        self._release(run[:n_kept], len(run) - n_kept)
        if found:
            self._on_phrase(found[0])
        return end

    def _on_phrase(self, phrase: str) -> None:
        if not self.in_thinking:
            self.stopped_by = phrase
            return
        self.in_thinking = False
        self._matcher = self._stops
        self._blanks = ""
        self._skips_newlines = True

    def _release(self, text: str, n_after: int = 0) -> None:
        """Pass on text that is certain, after which so many characters were read."""
        if self._skips_newlines:
            text = text.lstrip("\n")
        if not text:
            return
        self._skips_newlines = False
        start = self.origins.n_read - n_after - len(text)
        if not self.in_thinking:
            self.has_answered = True
            self.origins.note(start, len(text), in_thinking=False)
            self._events.append(TextDelta(text))
            return
        body = text.rstrip()
        if body:
            start -= len(self._blanks)
            body = self._blanks + body
            self._blanks = ""
            self.origins.note(start, len(body), in_thinking=True)
            self._events.append(ThinkingDelta(body))
        self._blanks += text[len(text.rstrip()) :]

    def _take_events(self) -> list[Event]:
        """The events since the last call, neighbours of one kind joined."""
        events: list[Event] = []
        for event in self._events:
            last = events[-1] if events else None
            if isinstance(event, TextDelta) and isinstance(last, TextDelta):
                events[-1] = TextDelta(last.text + event.text)
            elif isinstance(event, ThinkingDelta) and isinstance(last, ThinkingDelta):
                events[-1] = ThinkingDelta(last.text + event.text)
            else:
                events.append(event)
        self._events = []
        return events
