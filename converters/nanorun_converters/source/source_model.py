"""A source model: the tensors that its files hold, and how their bytes become numbers.

Tensors are read in runs of rows, so nothing here ever holds one whole, and any thread may read. No
tensor's meaning is known here.
"""

from __future__ import annotations

import codecs
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np

from nanorun.errors import ModelError
from nanorun.model.lookalikes import HEAD_BYTES, look_alike
from nanorun_converters.source.files import Files, Store
from nanorun_converters.source.safetensors_header import DTYPE_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_JSON_BYTES = 256 * 2**20
READABLE_DTYPES = ("BF16", "F16", "F32")
UNKNOWN_DTYPE = ""
"""Of a tensor that an index names, in a file that is not there; a plan needs no more."""


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

    def assumed(self, dtype: str, shape: tuple[int, ...]) -> SourceTensor:
        """This tensor, taken to have this dtype and shape: its file is not there to say."""
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
        """Elements `first` to `end` of the flattened tensor, as numbers: `(end - first,)`."""
        return decode(self.read_bytes(first, end), self.dtype)

    def read_bytes(self, first: int, end: int) -> NDArray[np.uint8]:
        """The bytes of elements `first` to `end` of the flattened tensor, as they are stored:
        `((end - first) * bytes of one,)`.
        """
        size = DTYPE_BYTES[self.dtype]
        return self.store.read(self.offset + first * size, (end - first) * size)


@dataclass(frozen=True, slots=True)
class SourceModel:
    """Everything about a source model that is known without reading a weight."""

    files: Files
    tensors: dict[str, SourceTensor]
    stores: tuple[Store, ...]
    """The files of weights, by name."""
    notes: list[str] = field(default_factory=list)
    """What was passed over or decided on the way; each part that reads the model adds to it."""

    def tell(self, note: str) -> None:
        """Add a note, once."""
        if note not in self.notes:
            self.notes.append(note)

    @property
    def origin(self) -> PurePath:
        """What errors call the source; they call a file of it `origin / name`."""
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
            raise ModelError(f"{self.origin}: expected a file {name}, found none")
        return found

    def find_json(self, name: str) -> dict[str, Any] | None:
        """The object in file `name`, or None where there is no such file."""
        store = self.files.find(name)
        return None if store is None else read_json(store, str(self.origin / name))

    def find_text(self, name: str) -> str | None:
        """The text of file `name`, or None where there is no such file."""
        store = self.files.find(name)
        return None if store is None else read_text(store, str(self.origin / name))


def read_json(store: Store, where: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: If it is not valid JSON, or not an object.
    """
    try:
        value = json.loads(read_text(store, where))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        refuse_look_alike(store, where, "JSON")
        raise ModelError(f"{where}: no valid JSON", facts=[str(error)]) from error
    if not isinstance(value, dict):
        raise ModelError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def read_text(store: Store, where: str) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        ModelError: If it is too long, or no text in UTF-8.
    """
    if store.n_bytes > MAX_JSON_BYTES:
        raise ModelError(f"{where}: expected at most {MAX_JSON_BYTES} bytes, found {store.n_bytes}")
    raw = store.read(0, store.n_bytes).tobytes()
    encoding = _other_encoding(raw)
    if encoding is not None:
        new = f"{where}.utf8"
        raise ModelError(
            f"{where}: expected text in UTF-8, found {encoding}",
            tries=[
                f"iconv -f {encoding} -t UTF-8 {quote(where)} > {quote(new)}",
                f"mv {quote(new)} {quote(where)}",
            ],
        )
    try:
        return raw.decode("utf-8-sig")  # editors on Windows put a byte order mark first
    except UnicodeDecodeError as error:
        refuse_look_alike(store, where, "text in UTF-8")
        raise ModelError(f"{where}: no text in UTF-8", facts=[str(error)]) from error


def _other_encoding(raw: bytes) -> str | None:
    """The name of an encoding of wide characters, by its mark or by the zeros that it is full of.

    No text of a source model has zeros, and all begin with a character of ASCII.
    """
    # UTF-32's mark begins as UTF-16's does.
    if raw.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    if len(raw) >= 2 and raw[0] and raw[1:2] == b"\0":
        return "UTF-32LE" if raw[2:4] == b"\0\0" else "UTF-16LE"
    if raw[:3] == b"\0\0\0" and raw[3:4] not in (b"", b"\0"):
        return "UTF-32BE"
    if raw[:1] == b"\0" and raw[1:2] not in (b"", b"\0", b"\x05"):
        return "UTF-16BE"
    return None


def refuse_look_alike(store: Store, where: str, expected: str) -> None:
    """Refuse a file that could not be read, if it is plain what it is instead.

    Raises:
        ModelError: Saying what it is.
    """
    head = store.read(0, min(store.n_bytes, HEAD_BYTES)).tobytes()
    found = look_alike(head, where)
    if found is not None:
        raise ModelError(
            f"{where}: expected {expected}, found {found.what}",
            facts=found.facts,
            tries=found.tries,
        )


def decode(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Little-endian bytes as numbers; exact for `READABLE_DTYPES`.

    Args:
        raw: Whole elements, `(n_elements * bytes of one,)`.
        dtype: What they are, in safetensors' words.

    Returns:
        The numbers, `(n_elements,)`.
    """
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
