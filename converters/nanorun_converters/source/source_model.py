"""A source model: the configs and files of weights that a conversion starts from.

Owns how files are read, where each tensor lies in them, and how its bytes become numbers. Tensors
are read in runs of rows, so nothing here ever holds one whole, and any thread may read. It knows no
tensor's meaning.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nanorun.errors import ModelError, SourceLostError
from nanorun_converters.source.safetensors_header import DTYPE_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_JSON_BYTES = 256 * 2**20
READABLE_DTYPES = ("BF16", "F16", "F32")
UNKNOWN_DTYPE = ""
"""Of a tensor that an index names, in a file that is not there; a plan needs no more."""


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
        """Exactly `n_bytes` bytes from `offset`; any thread may call."""


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
        """The names of all files, sorted."""

    def find(self, name: str) -> Store | None:
        """The file of this plain name, or None where there is none."""

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
        """Read into an array of its own, not through a mapping: mapped pages count as our memory.

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
class SourceTensor:
    """One tensor of the source model, or a slice of it along its first axis."""

    name: str
    store: Store
    dtype: str
    """As safetensors spells it."""
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def n_elements(self) -> int:
        """Numbers the tensor holds."""
        return math.prod(self.shape)

    @property
    def encoding(self) -> str:
        """Its dtype, for the table of types."""
        return self.dtype.lower()

    def assumed(self, dtype: str, shape: tuple[int, ...]) -> SourceTensor:
        """The same, taken to be of this form."""
        return replace(self, dtype=dtype, shape=shape)

    def part(self, index: int) -> SourceTensor:
        """Entry `index` of the first axis: one expert of a stack."""
        step = self.n_bytes // self.shape[0]
        return replace(
            self,
            name=f"{self.name}[{index}]",
            shape=self.shape[1:],
            offset=self.offset + index * step,
            n_bytes=step,
        )

    def read(self, first: int, end: int) -> NDArray[np.float32]:
        """Elements `first` to `end`, counted through all axes, as numbers."""
        return decode(self.read_bytes(first, end), self.dtype)

    def read_bytes(self, first: int, end: int) -> NDArray[np.uint8]:
        """Elements `first` to `end`, counted through all axes, as they are stored."""
        size = DTYPE_BYTES[self.dtype]
        return self.store.read(self.offset + first * size, (end - first) * size)


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
        return self.where.resolve().name

    @property
    def revision(self) -> str:
        """That of the snapshot."""
        return self.where.resolve().name if self._is_snapshot else ""

    @property
    def _is_snapshot(self) -> bool:
        parts = self.where.resolve().parts
        return len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--")

    def names(self) -> list[str]:
        """The names of all files, sorted."""
        return sorted(path.name for path in self.where.iterdir())

    def find(self, name: str) -> Store | None:
        """The file of this plain name, or None where there is none."""
        return local_file(self.where / name)

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


@dataclass(frozen=True, slots=True)
class SourceModel:
    """Everything about a source model that is known without reading a weight."""

    files: Files
    tensors: dict[str, SourceTensor]
    stores: tuple[Store, ...]
    """The files of weights, by name."""

    @property
    def folder(self) -> PurePath:
        """What to call the source in errors, and in commands to try."""
        return self.files.where

    @property
    def repository(self) -> str:
        """`owner/name` on the Hub where known, else the folder's own name."""
        return self.files.repository

    @property
    def revision(self) -> str:
        """Commit on the Hub, or "" where not known."""
        return self.files.revision

    @property
    def name(self) -> str:
        """The model's name, without its owner's."""
        return self.repository.rpartition("/")[2]

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in file `name`.

        Raises:
            ModelError: If the file is missing or holds anything else.
        """
        found = self.find_json(name)
        if found is None:
            raise ModelError(f"{self.folder}: expected a file {name}, found none")
        return found

    def find_json(self, name: str) -> dict[str, Any] | None:
        """The object in file `name`, or None where there is no such file."""
        store = self.files.find(name)
        return None if store is None else read_json(store, str(self.folder / name))

    def find_text(self, name: str) -> str | None:
        """The text of file `name`, or None where there is no such file."""
        store = self.files.find(name)
        return None if store is None else _read_text(store, str(self.folder / name))


def read_json(store: Store, where: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: If it is not valid JSON, or not an object.
    """
    try:
        value = json.loads(_read_text(store, where))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{where}: no valid JSON", facts=[str(error)]) from error
    if not isinstance(value, dict):
        raise ModelError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_text(store: Store, where: str) -> str:
    if store.n_bytes > MAX_JSON_BYTES:
        raise ModelError(f"{where}: expected at most {MAX_JSON_BYTES} bytes, found {store.n_bytes}")
    try:
        return store.read(0, store.n_bytes).tobytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{where}: no text in UTF-8", facts=[str(error)]) from error


def decode(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Little-endian bytes of `dtype` as float32; exact for all of `READABLE_DTYPES`."""
    match dtype:
        case "F32":
            return raw.view("<f4").astype(np.float32, copy=False)
        case "F16":
            return raw.view("<f2").astype(np.float32)
        case "BF16":
            # BF16 is the upper half of a float32.
            bits = raw.view("<u2").astype(np.uint32)
            bits <<= 16
            return bits.view(np.float32)
        case _:
            raise ValueError(f"no decoder for {dtype}")
