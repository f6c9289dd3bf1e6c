"""A cursor over the header of a GGUF: numbers, strings, arrays, checked before they cost anything.

It knows how values are written, and not what they mean; that is `gguf.py`'s.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

from nanorun.errors import ModelError

# Above real files (131072 tokens, 270000 merges, a tokenizer.json of 17 MB, 28 MB headers), low
# enough to stay harmless when a 60 GB file claims that all of it is one string.
MAX_STRING_BYTES = 32 * 2**20
MAX_ARRAY_ELEMENTS = 8 * 2**20
MAX_HEADER_BYTES = 64 * 2**20

_READ_AHEAD_BYTES = 2**20

UINT16, UINT32, STRING, ARRAY, BOOL = 2, 4, 8, 9, 7
"""Types of values; the others are numbers."""
_NUMBER_FORMATS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


class ByteStream(Protocol):
    """Something that gives bytes in order: an open file, or the body of an answer."""

    def read(self, n_bytes: int, /) -> bytes:
        """The next `n_bytes`, fewer at the end only."""


@dataclass(slots=True)
class GgufCursor:
    """Reads values in order; `_need` is the only place that reads the file.

    All methods raise `ModelError` where the file ends or a value breaks the format.
    """

    stream: ByteStream
    path: Path
    file_bytes: int
    where: str = "header"
    """What is being read, for messages."""
    position: int = 0
    """Of the cursor, in `buffer`, which always starts at the start of the file."""
    buffer: bytearray = field(default_factory=bytearray)

    def value(self, type_id: int) -> Any:
        """The value of a key, of a type that is no array."""
        if type_id == STRING:
            return self.string()
        value = self.number(self._number_format(type_id))
        return self._bools([value])[0] if type_id == BOOL else value

    def array(self) -> list[Any]:
        """The value of a key that is an array."""
        type_id, n = self.number("I"), self.number("Q")
        if type_id == ARRAY:
            self.refuse("an array of values", "an array of arrays")
        if n > MAX_ARRAY_ELEMENTS:
            self.refuse(f"at most {MAX_ARRAY_ELEMENTS} elements", str(n))
        if type_id == STRING:
            self.check_count("strings", n, 8)
            return self._strings(n)
        letter = self._number_format(type_id)
        raw = self.take(n * struct.calcsize(letter))
        values = list(struct.unpack(f"<{n}{letter}", raw))
        return self._bools(values) if type_id == BOOL else values

    def name(self, what: str, max_bytes: int) -> str:
        """A string that names something, at most `max_bytes` long."""
        name = self.string(max_bytes)
        if not name or not name.isprintable():
            self.refuse(f"a printable {what} name", repr(name))
        return name

    def string(self, max_bytes: int = MAX_STRING_BYTES) -> str:
        """A string of at most `max_bytes`."""
        length = self.number("Q")
        if length > max_bytes:
            self.refuse(f"a string of at most {max_bytes} bytes", str(length))
        return self._decode(self.take(length))

    def number(self, letter: str) -> Any:
        """A number, by its letter of `struct`."""
        return struct.unpack("<" + letter, self.take(struct.calcsize(letter)))[0]

    def take(self, n: int) -> bytes:
        """The next `n` bytes."""
        self._need(n)
        start, self.position = self.position, self.position + n
        return bytes(self.buffer[start : self.position])

    def check_count(self, what: str, n: int, min_bytes: int) -> None:
        """Refuse `n` entries of at least `min_bytes` each that the file has no room for."""
        most = (self.file_bytes - self.position) // min_bytes
        if n > most:
            self.refuse(f"at most {most} {what} in a file of {self.file_bytes} bytes", str(n))

    def refuse(self, expected: str, found: str) -> NoReturn:
        """Raise what is wrong with the place that is being read."""
        raise ModelError(f"{self.path}: {self.where}: expected {expected}, found {found}")

    def _strings(self, n: int) -> list[str]:
        # Vocabularies hold 131072 strings and more, so this loop keeps to locals and slices.
        strings: list[str] = []
        read_length = struct.Struct("<Q").unpack_from
        for _ in range(n):
            self._need(8)
            start = self.position + 8
            (length,) = read_length(self.buffer, self.position)
            self.position = start
            if length > MAX_STRING_BYTES:
                self.refuse(f"a string of at most {MAX_STRING_BYTES} bytes", str(length))
            self._need(length)
            self.position = start + length
            strings.append(self._decode(self.buffer[start : self.position]))
        return strings

    def _decode(self, raw: bytes | bytearray) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.refuse("text in UTF-8", f"{bytes(raw[:40])!r} ({error.reason})")

    def _number_format(self, type_id: int) -> str:
        if type_id not in _NUMBER_FORMATS:
            self.refuse("a value type from 0 to 12", str(type_id))
        return _NUMBER_FORMATS[type_id]

    def _bools(self, values: list[int]) -> list[bool]:
        for value in values:
            if value > 1:
                self.refuse("a truth value of 0 or 1", str(value))
        return [value == 1 for value in values]

    def _need(self, n: int) -> None:
        """Have the `n` bytes after the cursor in the buffer."""
        end = self.position + n
        if end <= len(self.buffer):
            return
        if end > self.file_bytes:
            self.refuse(f"{n} bytes at byte {self.position}", f"a file of {self.file_bytes} bytes")
        if end > MAX_HEADER_BYTES:
            self.refuse(f"a header of at most {MAX_HEADER_BYTES} bytes", "a longer one")
        self.buffer += self.stream.read(max(end - len(self.buffer), _READ_AHEAD_BYTES))
        if end > len(self.buffer):
            self.refuse(f"a file of {self.file_bytes} bytes", "that it shrank while it was read")
