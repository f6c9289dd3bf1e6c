"""The importance matrix: how large the inputs of each weight matrix are, column by column.

The error of a weight is multiplied by its input, so what a quantizer should keep small is the
squared error weighted by the mean of the squared input. Files are those of llama.cpp's
`llama-imatrix`: GGUF with `NAME.in_sum2` and `NAME.counts`, and the older `.dat`.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanorun.errors import ModelError, NanorunError
from nanorun.model.ggml_type import QK_K, GgmlType
from nanorun.model.gguf import DEFAULT_ALIGNMENT, MAGIC, GgufFile, read_gguf

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SUMS, _COUNTS = ".in_sum2", ".counts"
_KEY_CHUNKS, _KEY_CHUNK_SIZE = "imatrix.chunk_count", "imatrix.chunk_size"
_KEY_DATASETS, _KEY_TEXT = "imatrix.datasets", "nanorun.imatrix.text_sha256"
_KEY_SENSITIVITY = "nanorun.imatrix.sensitivity"
_MAX_DAT_BYTES = 2**31


@dataclass(slots=True)
class Entry:
    """The inputs of one tensor, added up."""

    sums: NDArray[np.float32]
    """Squares, `(n_mat, n_per_row)`; a matrix is an expert, or the only one."""
    counts: NDArray[np.int64]
    """Inputs seen, `(n_mat,)`."""


@dataclass(slots=True)
class Imatrix:
    """An importance matrix and the text it is from."""

    entries: dict[str, Entry] = field(default_factory=dict)
    """By the tensor's name."""
    datasets: tuple[str, ...] = ()
    chunk_size: int = 512
    n_chunks: int = 0
    name: str = "imatrix"
    """What to call it in errors: the file."""
    text_sha256: str = ""
    """Of the text, in hex, where nanorun collected it: an unfinished run is continued by it."""
    sensitivity: dict[str, float] = field(default_factory=dict)
    """KL divergence of the model's predictions for noise in a tensor's output, as a share of that
    output's power; by the tensor's name, where it was measured."""

    def add(self, name: str, i_mat: int, n_mat: int, inputs: NDArray[np.float32]) -> None:
        """Count `inputs`, `(n, n_per_row)`, of matrix `i_mat` of a tensor."""
        if name not in self.entries:
            shape = (n_mat, inputs.shape[1])
            self.entries[name] = Entry(np.zeros(shape, np.float32), np.zeros(n_mat, np.int64))
        entry = self.entries[name]
        # Summed in float64 over the batch: a long run adds small squares to a large sum.
        entry.sums[i_mat] += np.einsum("ij,ij->j", inputs, inputs, dtype=np.float64)
        entry.counts[i_mat] += len(inputs)

    def merge(self, other: Imatrix) -> None:
        """Add what another one has seen of the same model."""
        for name, entry in other.entries.items():
            mine = self.entries.get(name)
            if mine is None:
                self.entries[name] = entry
            else:
                mine.sums += entry.sums
                mine.counts += entry.counts

    def shares(self, name: str, n_mat: int) -> list[float]:
        """The share of a tensor's inputs that each of its matrices got; equal where not known."""
        entry = self.entries.get(name)
        if entry is None or len(entry.counts) != n_mat or not entry.counts.sum():
            return [1 / n_mat] * n_mat
        return [float(share) for share in entry.counts / entry.counts.sum()]

    def weights(self, name: str, i_mat: int, n_per_row: int) -> NDArray[np.float32] | None:
        """The mean square of each input of a matrix; None where the tensor was never seen.

        A matrix that got no input (an expert that no token chose) has weights of 1. Columns that
        padding added, here or where the imatrix was made, get a weight too small to matter.

        Raises:
            ModelError: If the entry is of a tensor of another width.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        n_mat, n_columns = entry.sums.shape
        if not _same_width(n_columns, n_per_row) or i_mat >= n_mat:
            raise ModelError(
                f"{self.name}: {name}: expected {n_per_row} columns, found {n_columns}",
                facts=["the imatrix is of another model"],
            )
        count = entry.counts[min(i_mat, len(entry.counts) - 1)]
        if count == 0:
            return np.ones(n_per_row, np.float32)
        means = np.zeros(n_per_row, np.float64)
        n = min(n_columns, n_per_row)
        means[:n] = entry.sums[i_mat, :n] / float(count)
        # Some encoders divide by the weights of a block.
        floor = 1e-6 * float(means.mean())
        return np.maximum(means, floor).astype(np.float32) if floor else np.ones(n_per_row, "f4")


def _same_width(a: int, b: int) -> bool:
    """Whether two widths are of the same tensor, one of them possibly padded."""
    return a == b or -(-min(a, b) // QK_K) * QK_K == max(a, b)


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
    )


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


def per_expert(imatrix: Imatrix, n_experts: Mapping[str, int]) -> Imatrix:
    """An imatrix read from a `.dat`, whose experts stand in one row, with a row for each."""
    for name, n in n_experts.items():
        entry = imatrix.entries.get(name)
        if entry is not None and entry.sums.shape[0] == 1 < n and entry.sums.size % n == 0:
            counts = np.repeat(entry.counts, n)
            imatrix.entries[name] = Entry(entry.sums.reshape(n, -1), counts)
    return imatrix


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """Write llama.cpp's GGUF form; the file appears under its name when it is whole.

    Raises:
        NanorunError: If it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as stream:
            stream.write(_render(imatrix))
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise NanorunError(f"{path} cannot be written: {error.strerror or error}") from error


def _render(imatrix: Imatrix) -> bytes:
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
    directory, data, offset = b"", [], 0
    for name, values in tensors.items():
        directory += _text(name) + struct.pack("<IQQIQ", 2, *values.shape[::-1], 0, offset)
        raw = _aligned(np.ascontiguousarray(values, "<f4").tobytes())
        data.append(raw)
        offset += len(raw)
    head = MAGIC + struct.pack("<IQQ", 3, len(tensors), 6) + keys + directory
    return b"".join([_aligned(head), *data])


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(raw)) + raw


def _aligned(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % DEFAULT_ALIGNMENT)
