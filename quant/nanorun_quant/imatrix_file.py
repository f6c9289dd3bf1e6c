"""Files of an importance matrix: those of llama.cpp's `llama-imatrix`.

GGUF with `NAME.in_sum2` and `NAME.counts`, and `NAME.in_gram` where Gram matrices were collected,
which llama.cpp's tools pass over; and the older `.dat`, which is only read.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanorun.errors import ModelError, NanorunError
from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import DEFAULT_ALIGNMENT, MAGIC, GgufFile, read_gguf
from nanorun_quant.imatrix import Entry, Imatrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SUMS, _COUNTS, _GRAM = ".in_sum2", ".counts", ".in_gram"
_KEY_CHUNKS, _KEY_CHUNK_SIZE = "imatrix.chunk_count", "imatrix.chunk_size"
_KEY_DATASETS, _KEY_TEXT = "imatrix.datasets", "nanorun.imatrix.text_sha256"
_KEY_SENSITIVITY = "nanorun.imatrix.sensitivity"
_MAX_DAT_BYTES = 2**31


def read_imatrix(path: Path) -> Imatrix:
    """Read an imatrix, in either form.

    Raises:
        ModelError: If the file is missing, damaged, or no imatrix.
    """
    try:
        with path.open("rb") as stream:
            is_gguf = stream.read(4) == MAGIC
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    return _read_gguf(path) if is_gguf else _read_dat(path)


def _read_gguf(path: Path) -> Imatrix:
    gguf = read_gguf(path)
    entries: dict[str, Entry] = {}
    for name in gguf.tensors:
        if name.endswith(_SUMS):
            stem = name.removesuffix(_SUMS)
            counts = _floats(gguf, stem + _COUNTS).reshape(-1)
            sums = _floats(gguf, name).reshape(counts.size, -1)
            entries[stem] = Entry(sums, np.rint(counts).astype(np.int64))
    if not entries:
        raise ModelError(f"{path}: expected the sums of an imatrix, found none")
    datasets = gguf.find(_KEY_DATASETS, list) or []
    return Imatrix(
        entries,
        tuple(str(text) for text in datasets),
        gguf.find(_KEY_CHUNK_SIZE, int) or 0,
        gguf.find(_KEY_CHUNKS, int) or 0,
        str(path),
        gguf.find(_KEY_TEXT, str) or "",
        _sensitivity(gguf),
        {n.removesuffix(_GRAM): _gram(gguf, n) for n in gguf.tensors if n.endswith(_GRAM)},
    )


def _gram(gguf: GgufFile, name: str) -> NDArray[np.float32]:
    """A Gram matrix, left in the file until it is used: all of Nano's together are 4.4 GiB."""
    tensor = gguf.tensors[name]
    n = tensor.shape[-1]
    if tensor.type is not GgmlType.F32 or tensor.shape != (n, n):
        raise ModelError(
            f"{gguf.path}: {name}: expected a square matrix of f32, found {tensor.type.label} of"
            f" shape {tensor.shape}"
        )
    return np.memmap(tensor.path, "<f4", "r", tensor.offset, tensor.shape)


def _sensitivity(gguf: GgufFile) -> dict[str, float]:
    """By the tensor's name, from lines `name=number`."""
    found: dict[str, float] = {}
    for line in gguf.find(_KEY_SENSITIVITY, list) or []:
        name, _, number = str(line).partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            found[name] = math.nan
        if not (math.isfinite(found[name]) and found[name] >= 0):
            raise ModelError(
                f"{gguf.path}: key {_KEY_SENSITIVITY!r}: expected NAME=NUMBER, found {line!r:.60}"
            )
    return found


def _floats(gguf: GgufFile, name: str) -> NDArray[np.float32]:
    tensor = gguf.tensors.get(name)
    if tensor is None or tensor.type is not GgmlType.F32:
        found = tensor.type.label if tensor else "no such tensor"
        raise ModelError(f"{gguf.path}: {name}: expected f32, found {found}")
    values = np.fromfile(tensor.path, "<f4", tensor.n_elements, offset=tensor.offset)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ModelError(f"{gguf.path}: {name}: expected finite numbers from 0")
    return values.reshape(tensor.shape)


def _read_dat(path: Path) -> Imatrix:
    """The older form: per tensor its name, calls and means times calls; then calls and the text."""
    if path.stat().st_size > _MAX_DAT_BYTES:
        raise ModelError(f"{path}: expected at most {_MAX_DAT_BYTES} bytes")
    cursor = _Cursor(path, path.read_bytes())
    n_entries = cursor.count("tensors", 2**16)
    if n_entries < 1:
        raise ModelError(f"{path}: expected a GGUF or .dat imatrix, found neither")
    entries = {}
    for _ in range(n_entries):
        name = cursor.take(cursor.count("bytes of a name", 256)).decode("utf-8", "replace")
        n_calls = cursor.count("calls", 2**31 - 1)
        n_values = cursor.count("values", 2**29)
        sums = np.frombuffer(cursor.take(4 * n_values), "<f4").astype(np.float32)
        entries[name] = Entry(sums.reshape(1, -1), np.array([n_calls], np.int64))
    n_chunks = cursor.count("chunks", 2**31 - 1) if cursor.n_left >= 4 else 0
    n_text = cursor.count("bytes of a name", 2**16) if cursor.n_left >= 4 else 0
    text = cursor.take(n_text).decode("utf-8", "replace")
    return Imatrix(entries, (text,) if text else (), 0, n_chunks, str(path))


@dataclass(slots=True)
class _Cursor:
    path: Path
    data: bytes
    position: int = 0

    @property
    def n_left(self) -> int:
        return len(self.data) - self.position

    def take(self, n: int) -> bytes:
        if n > self.n_left:
            raise ModelError(
                f"{self.path}: expected {n} bytes at byte {self.position}, found {self.n_left}"
            )
        start, self.position = self.position, self.position + n
        return self.data[start : self.position]

    def count(self, what: str, most: int) -> int:
        (value,) = struct.unpack("<i", self.take(4))
        if not 0 <= value <= most:
            raise ModelError(f"{self.path}: expected at most {most} {what}, found {value}")
        return int(value)


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """Write llama.cpp's GGUF form; the file appears under its name when it is whole.

    Raises:
        NanorunError: If it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as stream:
            stream.writelines(_render(imatrix))
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise NanorunError(f"{path} cannot be written: {error.strerror or error}") from error


def _render(imatrix: Imatrix) -> Iterator[bytes | memoryview]:
    """The file, piece by piece: the matrices are too large to be there twice."""
    keys = (
        _text("general.type") + struct.pack("<I", 8) + _text("imatrix")
        + _text(_KEY_DATASETS) + struct.pack("<IIQ", 9, 8, len(imatrix.datasets))
        + b"".join(map(_text, imatrix.datasets))
        + _text(_KEY_CHUNKS) + struct.pack("<II", 4, imatrix.n_chunks)
        + _text(_KEY_CHUNK_SIZE) + struct.pack("<II", 4, imatrix.chunk_size)
        + _text(_KEY_TEXT) + struct.pack("<I", 8) + _text(imatrix.text_sha256)
        + _text(_KEY_SENSITIVITY) + struct.pack("<IIQ", 9, 8, len(imatrix.sensitivity))
        + b"".join(
            _text(f"{name}={number:.6e}") for name, number in imatrix.sensitivity.items()
        )
    )  # fmt: skip
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, entry in sorted(imatrix.entries.items()):
        tensors[name + _SUMS] = entry.sums
        tensors[name + _COUNTS] = entry.counts.astype(np.float32)[:, None]
    for name, gram in sorted(imatrix.grams.items()):
        tensors[name + _GRAM] = gram
    directory, offset = b"", 0
    for name, values in tensors.items():
        directory += _text(name) + struct.pack("<IQQIQ", 2, *values.shape[::-1], 0, offset)
        offset += values.nbytes + _n_padding(values.nbytes)
    head = MAGIC + struct.pack("<IQQ", 3, len(tensors), 6) + keys + directory
    yield head
    yield bytes(_n_padding(len(head)))
    for values in tensors.values():
        yield np.ascontiguousarray(values, "<f4").data
        yield bytes(_n_padding(values.nbytes))


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(raw)) + raw


def _n_padding(n_bytes: int) -> int:
    return -n_bytes % DEFAULT_ALIGNMENT
