"""Writing GGUF files in one pass, under names that cannot be taken for finished ones.

The headers are laid out before any data, so sizes are known to the byte beforehand. Data is then
written in file order to `NAME.part`, synced now and then, and noted in a journal beside it, so that
the same conversion can go on where it was cut short. Only when all is whole do the files get their
names, the first of several last: it is the one that a model is opened by.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

from nanorun.errors import NanorunError, SourceUnreachableError, UsageError
from nanorun.model.units import format_gib
from nanorun_converters.output.gguf_header import Layout, padded_bytes
from nanorun_converters.output.journal import Journal, Stretch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SYNC_BYTES = 256 * 2**20
SYNC_SECONDS = 5.0
"""Data is synced and noted after so much of it, or so long; a stop costs no more than that."""
_READ_STEP = 4 * 2**20


def part_of(path: Path) -> Path:
    """The name that a file has until all is whole."""
    return path.with_name(f"{path.name}.part")


class OutputFiles:
    """The files being written; a context manager that leaves all of them, a start, or nothing.

    `write` takes the data of all slots in order, in pieces of any size; `finish` gives the files
    their names. What an error leaves is removed, unless the work can go on later: after Ctrl-C, or
    when the source cannot be reached, what is written stays for the next run.
    """

    def __init__(
        self, paths: Sequence[Path], layouts: Sequence[Layout], fingerprint: str = ""
    ) -> None:
        self.paths = tuple(paths)
        self.parts = tuple(map(part_of, paths))
        self.layouts = tuple(layouts)
        first = self.parts[0]
        self.journal = Journal(first.with_name(f"{first.name}.json"), fingerprint)
        self.n_data_done = 0
        """Bytes of tensor data that an earlier run has left whole."""
        self._streams: list[BinaryIO] = []
        self._slots = [slot for layout in self.layouts for slot in layout.slots]
        self._i_file = 0
        self._n_slots_left = 0
        """Of the current file, after the current tensor."""
        self._i_slot = -1
        self._n_left = 0
        """Bytes of the current tensor still to come."""
        self._padding = 0
        self._crc, self._n_unsynced, self._synced_at = 0, 0, time.monotonic()
        self._whole: Stretch | None = None
        """What may be noted: all that is written since the last note but for a piece that was
        interrupted, set at once, so that Ctrl-C finds file, checksum and counts in step."""
        self._n_data = 0

    def __enter__(self) -> Self:
        try:
            self._streams.append(_open_exclusively(self.parts[0]))
            self._resume()
            self.journal.start()
        except BaseException as error:
            # Ctrl-C while an earlier run's work is checked must not cost that work.
            stopped = not isinstance(error, Exception)
            self._abandon(keep=stopped and self.journal.path.exists())
            if isinstance(error, OSError):
                raise self._failure(error) from error
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._streams:
            return
        keep = isinstance(error, (KeyboardInterrupt, SystemExit, SourceUnreachableError))
        if keep:
            with suppress(OSError):
                self._note_stretch()
        keep = keep and bool(self.journal.stretches)
        if keep and isinstance(error, SourceUnreachableError):
            error.facts += ("what was converted so far is kept: the same command goes on",)
        self._abandon(keep=keep)

    @property
    def resumed(self) -> bool:
        """Whether an earlier run left something to go on with."""
        return self.n_data_done > 0

    def write(self, data: NDArray[np.uint8]) -> None:
        """Append data of the current tensor; the last piece brings its padding along.

        Args:
            data: Bytes, in any shape; they follow one another in C order.

        Raises:
            NanorunError: If it cannot be written: disk full, file too large, folder gone.
        """
        if data.nbytes > self._n_left:
            raise ValueError(f"{data.nbytes} bytes for a tensor with {self._n_left} to come")
        try:
            self._put(data.data)
            self._n_left -= data.nbytes
            self._n_data += data.nbytes
            if self._n_left == 0:
                self._put(bytes(self._padding))
            self._whole = self._stretch()
            if self._n_left == 0:
                self._next_slot()
            age = time.monotonic() - self._synced_at
            if self._n_unsynced >= SYNC_BYTES or age >= SYNC_SECONDS:
                self._note_stretch()
        except OSError as error:
            raise self._failure(error) from error

    def finish(self, headers: Sequence[bytes]) -> None:
        """Put the final headers in place, sync, and give the files their names.

        Headers are written again because hashes of the source are known only now; they have the
        lengths they were laid out with.
        """
        lengths = [len(layout.header) for layout in self.layouts]
        if not self._streams or self._n_left or [len(h) for h in headers] != lengths:
            raise ValueError("the files are not whole")
        try:
            for stream, header in zip(self._streams, headers, strict=True):
                stream.seek(0)
                _write_all(stream, header)
                os.fsync(stream.fileno())
            if os.name == "nt":
                self._close()
            for part, path in reversed(list(zip(self.parts, self.paths, strict=True))):
                part.replace(path)
            _sync_folder(self.paths[0].parent)
            self.journal.remove()
            self._close()
        except OSError as error:
            raise self._failure(error) from error

    def _resume(self) -> None:
        """Find the end of what an earlier run left whole, and go there."""
        self.journal.read()
        self._take_names_back()
        good = self._good_stretches()
        self.journal.stretches = list(good)
        n_files = good[-1].i_file + 1 if good else 1
        for part in self.parts[n_files:]:
            part.unlink(missing_ok=True)
        for i in range(n_files):
            if i > 0:
                self._streams.append(_open(self.parts[i]))
            ends = [stretch.end for stretch in good if stretch.i_file == i]
            self._streams[i].truncate(ends[-1] if ends else 0)
            if not ends:
                self._streams[i].seek(0)
                _write_all(self._streams[i], self.layouts[i].header)
            self._streams[i].seek(0, os.SEEK_END)
        self._i_file = n_files - 1
        self._go_to(good[-1].n_data if good else 0)

    def _take_names_back(self) -> None:
        """Undo what a run did that was killed while it gave the files their names."""
        if not self.journal.stretches:
            return
        for part, path in zip(self.parts[1:], self.paths[1:], strict=True):
            if path.exists() and not part.exists() and not self.paths[0].exists():
                path.replace(part)

    def _good_stretches(self) -> list[Stretch]:
        """The stretches whose data is still there, up to the first that is not."""
        good: list[Stretch] = []
        start = len(self.layouts[0].header)
        boundaries = self._boundaries()
        for stretch in self.journal.stretches:
            if good and stretch.i_file == good[-1].i_file + 1 < len(self.layouts):
                start = len(self.layouts[stretch.i_file].header)
            elif stretch.i_file != (good[-1].i_file if good else 0):
                break
            if stretch.end < start or not self._fits(stretch, boundaries):
                break
            crc = _crc_of(self.parts[stretch.i_file], start, stretch.end)
            if crc != stretch.crc32:
                break
            good.append(stretch)
            start = stretch.end
        return good

    def _boundaries(self) -> list[tuple[int, int, int, int]]:
        """Of each tensor: its file, where it starts there, its bytes, and the data before it."""
        found, n_data = [], 0
        for i_file, layout in enumerate(self.layouts):
            offset = len(layout.header)
            for slot in layout.slots:
                found.append((i_file, offset, slot.n_bytes, n_data))
                offset += padded_bytes(slot.n_bytes)
                n_data += slot.n_bytes
        return found

    def _fits(self, stretch: Stretch, boundaries: list[tuple[int, int, int, int]]) -> bool:
        """Whether the end of a stretch and its count of data speak of the same place."""
        for i_file, offset, n_bytes, n_data in boundaries:
            n_in = stretch.n_data - n_data
            if i_file == stretch.i_file and 0 < n_in <= n_bytes:
                end = offset + (padded_bytes(n_bytes) if n_in == n_bytes else n_in)
                return stretch.end == end
        return False

    def _go_to(self, n_data: int) -> None:
        """Set the position after `n_data` bytes of tensor data."""
        self.n_data_done = self._n_data = n_data
        self._next_slot(opens=False)
        while self._n_left <= n_data and self._i_slot < len(self._slots):
            n_data -= self._n_left
            self._next_slot(opens=False)
        self._n_left -= n_data
        # A run may have stopped just before it opened the next file.
        if self._i_slot < len(self._slots):
            self._open_up_to(self._file_of(self._i_slot))

    def _file_of(self, i_slot: int) -> int:
        for i_file, layout in enumerate(self.layouts):
            if i_slot < len(layout.slots):
                return i_file
            i_slot -= len(layout.slots)
        raise ValueError(f"there is no slot {i_slot}")

    def _next_slot(self, *, opens: bool = True) -> None:
        self._i_slot += 1
        if self._i_slot >= len(self._slots):
            self._n_left = self._padding = 0
            return
        self._n_left = self._slots[self._i_slot].n_bytes
        self._padding = padded_bytes(self._n_left) - self._n_left
        if opens:
            self._open_up_to(self._file_of(self._i_slot))

    def _open_up_to(self, i_file: int) -> None:
        while len(self._streams) <= i_file:
            self._note_stretch()
            stream = _open(self.parts[len(self._streams)])
            self._streams.append(stream)
            stream.truncate(0)
            _write_all(stream, self.layouts[len(self._streams) - 1].header)
        self._i_file = i_file

    def _stretch(self) -> Stretch:
        end = self._streams[self._i_file].tell()
        return Stretch(self._i_file, end, self._crc, self._n_data)

    def _note_stretch(self) -> None:
        """Sync what was written since the last time and note it in the journal."""
        if self._whole is not None:
            os.fsync(self._streams[self._whole.i_file].fileno())
            self.journal.add(self._whole)
        self._whole = None
        self._crc, self._n_unsynced, self._synced_at = 0, 0, time.monotonic()

    def _put(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        _write_all(self._streams[self._i_file], view)
        self._crc = zlib.crc32(view, self._crc)
        self._n_unsynced += len(view)

    def _abandon(self, *, keep: bool) -> None:
        # Removed before it is closed: closing lets go of the lock, and the names must not be taken
        # from another conversion that may have started then. Windows removes no open file.
        is_open = bool(self._streams)
        if not keep and is_open and os.name != "nt":
            self._remove()
        self._close()
        if not keep and is_open and os.name == "nt":
            self._remove()

    def _remove(self) -> None:
        self.journal.remove()
        for part in self.parts:
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def _close(self) -> None:
        with suppress(OSError):
            self.journal.close()
        for stream in self._streams:
            with suppress(OSError):
                stream.close()
        self._streams = []

    def _failure(self, error: OSError) -> NanorunError:
        reason = error.strerror or str(error)
        n_bytes = sum(layout.file_bytes for layout in self.layouts)
        return NanorunError(
            f"{self.paths[0]} cannot be written: {reason.lower()}",
            facts=[f"it takes {format_gib(n_bytes)}; nothing was left behind"],
        )


def _write_all(stream: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def _crc_of(path: Path, start: int, end: int) -> int | None:
    """The checksum of a run of bytes; None where the file does not hold all of it."""
    crc = 0
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(start)
            while start < end:
                data = stream.read(min(_READ_STEP, end - start))
                if not data:
                    return None
                crc = zlib.crc32(data, crc)
                start += len(data)
    except OSError:
        return None
    return crc


def _open(part: Path) -> BinaryIO:
    # Not truncated on opening: it may hold what an earlier run left, or be another's.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(part, flags, 0o666), "r+b", buffering=0)


def _open_exclusively(part: Path) -> BinaryIO:
    """Open the part for writing, unless another process is writing it.

    Raises:
        UsageError: If another process is.
    """
    while True:
        stream = _open(part)
        try:
            _lock(stream, part)
            if os.path.samestat(os.fstat(stream.fileno()), part.stat()):
                return stream
        except FileNotFoundError:
            pass
        except BaseException:
            stream.close()
            raise
        # The one who held it has renamed or removed it meanwhile: open the name anew.
        stream.close()


def _lock(stream: BinaryIO, part: Path) -> None:
    try:
        import fcntl
    except ImportError:
        # Windows refuses to rename or remove a file that another process has open.
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"another process is writing {part}", facts=["wait for it, or choose another --out"]
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make the renames survive a power cut, where folders can be synced."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
