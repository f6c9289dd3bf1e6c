"""What is known to be whole of a conversion that was cut short.

The journal lies beside the unfinished file. Its first line says which conversion it is of; each
further one, written after the data it speaks of is on the disk, gives the next stretch of the file
and its checksum, or the hash of one of the source's files. A line that was torn by a power cut, and
all after it, do not count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, TextIO

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Stretch:
    """A run of bytes of one file, ending where a piece of a tensor ends."""

    i_file: int
    end: int
    """Where it ends in the file; it starts where the one before ended."""
    crc32: int
    n_data: int
    """Bytes of tensor data up to here, in all files, without the padding between tensors."""


@dataclass(slots=True)
class Journal:
    """The journal of one conversion; `read` finds out whether an earlier one goes on."""

    path: Path
    fingerprint: str
    """Of everything the output depends on."""
    stretches: list[Stretch] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the source's files hashed so far, by name."""
    is_of_another: bool = False
    """Whether there was a journal of another conversion, which is lost now."""
    _stream: TextIO | None = None
    _lock: Lock = field(default_factory=Lock)

    def read(self) -> None:
        """Take over what an earlier run of the same conversion wrote."""
        records = self._records()
        first = next(records, None)
        if first is None:
            return
        if first != self._title():
            self.is_of_another = True
            return
        for record in records:
            try:
                if "sha256" in record:
                    self.hashes[str(record["file"])] = str(record["sha256"])
                else:
                    self.stretches.append(Stretch(**{k: int(v) for k, v in record.items()}))
            except (KeyError, TypeError, ValueError):
                return

    def start(self) -> None:
        """Write the journal anew, with what is in it, and keep it open.

        Beside the old one, which counts until the new one is whole.
        """
        self.close()
        new = self._path_of_new()
        records = [self._title(), *map(_fields, self.stretches)]
        records += [{"file": name, "sha256": digest} for name, digest in self.hashes.items()]
        with new.open("w", encoding="utf-8") as stream:
            stream.writelines(f"{json.dumps(record)}\n" for record in records)
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(self.path)
        self._stream = self.path.open("a", encoding="utf-8")

    def add(self, stretch: Stretch) -> None:
        """Note a stretch; its data must be on the disk."""
        with self._lock:
            self.stretches.append(stretch)
            self._put(_fields(stretch))
            self._sync()

    def add_hash(self, name: str, digest: str) -> None:
        """Note the hash of one of the source's files; any thread may call."""
        with self._lock:
            self.hashes[name] = digest
            if self._stream is not None:
                # Not worth failing for: the file would only have to be hashed again.
                with suppress(OSError):
                    self._put({"file": name, "sha256": digest})

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            if self._stream is not None:
                self._stream.close()
                self._stream = None

    def remove(self) -> None:
        """Close it and take it away."""
        with suppress(OSError):
            self.close()
        for path in (self.path, self._path_of_new()):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _path_of_new(self) -> Path:
        return self.path.with_name(f"{self.path.name}.new")

    def _title(self) -> dict[str, Any]:
        return {"nanorun_journal": FORMAT, "fingerprint": self.fingerprint}

    def _records(self) -> Iterator[dict[str, Any]]:
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                return
            if not isinstance(record, dict):
                return
            yield record

    def _put(self, record: dict[str, Any]) -> None:
        assert self._stream is not None
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def _sync(self) -> None:
        assert self._stream is not None
        os.fsync(self._stream.fileno())


def _fields(stretch: Stretch) -> dict[str, int]:
    return {
        "i_file": stretch.i_file,
        "end": stretch.end,
        "crc32": stretch.crc32,
        "n_data": stretch.n_data,
    }
