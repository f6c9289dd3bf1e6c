"""The files of a source model: where they are, and how a range of their bytes is read.

A file is read in runs of bytes, by any thread. What is in it is not known here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Protocol

import numpy as np

from nanorun.errors import ModelError, SourceLostError
from nanorun.file_names import readable

if TYPE_CHECKING:
    from numpy.typing import NDArray

TEMPLATES_FOLDER = "additional_chat_templates"


def counts(name: str) -> bool:
    """Whether a file of this name, within its folder, can be part of a source model."""
    path = PurePosixPath(name)
    # macOS leaves `._NAME` beside every file on a disk that is not its own.
    return not path.name.startswith("._") and str(path.parent) in (".", TEMPLATES_FOLDER)


class Store(Protocol):
    """Something whose bytes can be read by range: a file, or an object on the Hub."""

    @property
    def name(self) -> str:
        """What to call it in errors and in the output's metadata."""

    @property
    def n_bytes(self) -> int:
        """Size of the whole."""

    @property
    def stamp(self) -> str:
        """Changes when the content does."""

    @property
    def sha256(self) -> str:
        """Hash of the content in hex, where it is known without reading it, or ""."""

    def read(self, offset: int, n_bytes: int) -> NDArray[np.uint8]:
        """Exactly `n_bytes` bytes from `offset`, `(n_bytes,)`; any thread may call."""


class Files(Protocol):
    """The files of a source model: those of a folder, or of a repository on the Hub."""

    @property
    def where(self) -> PurePath:
        """What to call the whole in errors; a file is called `where / name`."""

    @property
    def repository(self) -> str:
        """`owner/name` on the Hub where known, else the folder's own name."""

    @property
    def revision(self) -> str:
        """Commit on the Hub, or "" where not known."""

    @property
    def argument(self) -> str:
        """What a person types as SRC for it."""

    @property
    def n_reads_ahead(self) -> int:
        """Reads worth having under way beside those that the cores work on."""

    def names(self) -> list[str]:
        """The names of all files that count, sorted; those of further templates with folder."""

    def find(self, name: str) -> Store | None:
        """The file of this plain name, or None where there is none."""

    def modified(self, name: str) -> int | None:
        """When file `name` was last written, in nanoseconds; None where that is not known."""

    def give_up(self) -> None:
        """End what is read just now, and read no more; any thread may call."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file on disk. Opened anew for each read, so threads share no position."""

    path: Path
    n_bytes: int
    stamp: str = ""
    sha256: str = ""

    @property
    def name(self) -> str:
        """The file's name, without its folder."""
        return self.path.name

    def read(self, offset: int, n_bytes: int) -> NDArray[np.uint8]:
        """Read `(n_bytes,)` into an array of its own: mapped pages would count as our memory.

        Raises:
            ModelError: If the file cannot be read, ends before the range does, or is another by
                now.
        """
        buffer = np.empty(n_bytes, np.uint8)
        view, done = buffer.data, 0
        try:
            with self.path.open("rb", buffering=0) as stream:
                stream.seek(offset)
                while done < n_bytes and (n := stream.readinto(view[done:])):
                    done += n
                stamp = _stamp(os.fstat(stream.fileno()))
        except OSError as error:
            raise SourceLostError(f"{self.path}: {error.strerror or error}") from error
        if done < n_bytes:
            raise ModelError(
                f"{self.path}: expected {n_bytes} bytes at byte {offset}, found {done}",
                facts=["the file was cut short while it was read"],
            )
        if self.stamp and stamp != self.stamp:
            raise ModelError(f"{self.path} was changed while it was read")
        return buffer


@dataclass(frozen=True, slots=True)
class MissingFile:
    """A file that an index names and that is not there: enough to plan, not to convert."""

    name: str
    n_bytes: int = 0
    stamp: str = ""
    sha256: str = ""

    def read(self, offset: int, n_bytes: int) -> NDArray[np.uint8]:
        """Raises, always."""
        raise ModelError(f"{self.name}: expected this file of weights, found nothing there")


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """The files of a folder."""

    where: Path
    n_reads_ahead: int = 0

    @property
    def argument(self) -> str:
        """What a person types as SRC for it."""
        return str(self.where)

    @property
    def repository(self) -> str:
        """That of the snapshot, where the folder is one in the Hub's cache layout."""
        parts = self.where.resolve().parts
        if self._is_snapshot:
            return parts[-3].removeprefix("models--").replace("--", "/", 1)
        return readable(self.where.resolve().name)

    @property
    def revision(self) -> str:
        """That of the snapshot."""
        return self.where.resolve().name if self._is_snapshot else ""

    @property
    def _is_snapshot(self) -> bool:
        parts = self.where.resolve().parts
        return len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--")

    def names(self) -> list[str]:
        """The names of all files that count, sorted; those of further templates with folder."""
        paths = [*self.where.iterdir(), *(self.where / TEMPLATES_FOLDER).glob("*")]
        return sorted(filter(counts, (path.relative_to(self.where).as_posix() for path in paths)))

    def find(self, name: str) -> Store | None:
        """The file of this plain name, or None where there is none."""
        return local_file(self.where / name)

    def modified(self, name: str) -> int | None:
        """When file `name` was last written, in nanoseconds; None where there is none.

        None in the Hub's cache as well: there it is the time of the download.
        """
        if self._is_snapshot:
            return None
        path = self.where / name
        return path.stat().st_mtime_ns if path.is_file() else None

    def give_up(self) -> None:
        """Nothing to do: a disk answers soon."""


def local_file(path: Path) -> LocalFile | None:
    """The file at `path`, as it is now."""
    if not path.is_file():
        return None
    status = path.stat()
    return LocalFile(path, status.st_size, _stamp(status))


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"
