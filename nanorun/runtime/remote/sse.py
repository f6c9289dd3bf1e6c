"""Reading server-sent events from bytes that arrive in pieces cut anywhere."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nanorun.errors import EngineError

DONE = "[DONE]"
"""The data of the event that ends a stream."""
MAX_EVENT_BYTES = 16 * 2**20
"""No chunk of an answer comes near this; an endpoint that never ends a line would fill memory."""

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class SseData:
    """The data of one event."""

    text: str


@dataclass(frozen=True, slots=True)
class SseComment:
    """A line that clients may skip."""

    text: str


SseItem = SseData | SseComment


class SseDecoder:
    """Splits a byte stream into events and comments.

    Lines may end with LF, CR or CR LF. Event names, ids and retry times are read over: endpoints
    that answer in OpenAI's style say everything in the data.

    Args:
        max_bytes: Longest line, and longest event.
    """

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._line = bytearray()
        self._data: list[str] = []
        self._n_data = 0
        self._skips_newline = False
        self._is_first_line = True
        self._items: list[SseItem] = []

    def feed(self, piece: bytes) -> list[SseItem]:
        """Read the next bytes.

        Raises:
            EngineError: If a line or an event is longer than any should be.
        """
        start = 0
        if self._skips_newline and piece:
            # The CR that ended the last piece was the first half of a CR LF.
            start = int(piece.startswith(b"\n"))
            self._skips_newline = False
        for match in _LINE_END.finditer(piece, start):
            self._line += piece[start : match.start()]
            self._end_line()
            start = match.end()
            self._skips_newline = match[0] == b"\r" and start == len(piece)
        self._line += piece[start:]
        self._check(len(self._line))
        return self._take_items()

    def finish(self) -> list[SseItem]:
        """Say that no more comes; an event whose blank line is missing counts as complete."""
        if self._line:
            self._end_line()
        self._end_event()
        return self._take_items()

    def _end_line(self) -> None:
        self._check(len(self._line))
        line = bytes(self._line)
        self._line.clear()
        if self._is_first_line:
            self._is_first_line = False
            line = line.removeprefix(_BOM)
        if not line:
            self._end_event()
            return
        field, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if not field:
            self._items.append(SseComment(value))
        elif field == "data":
            self._n_data += len(line)
            self._check(self._n_data)
            self._data.append(value)

    def _end_event(self) -> None:
        if self._data:
            self._items.append(SseData("\n".join(self._data)))
            self._data, self._n_data = [], 0

    def _check(self, n_bytes: int) -> None:
        if n_bytes > self._max_bytes:
            raise EngineError(
                f"a line or event of the stream is longer than {self._max_bytes} bytes"
            )

    def _take_items(self) -> list[SseItem]:
        items, self._items = self._items, []
        return items
