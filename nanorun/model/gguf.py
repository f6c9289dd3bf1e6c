"""Reading the header and tensor directory of a GGUF file that may be damaged or hostile.

Every length, count, type, offset and shape is checked against the file's size and the format's
limits before it is used, so a bad file costs a `ModelError` and never memory or time. What the
engine would refuse or abort on (gaps between tensors, rows that are not whole blocks) is refused
here first, with the file, the key or tensor, what was expected and what was found.

Layout: magic, version, tensor count, key count; keys; tensor directory; padding; tensor data.

A model may be split into several files: the first holds the keys, each a directory of its own
tensors, and `split.no` of `split.count`. They are read as one, by the first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from nanorun.errors import ModelError
from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf_cursor import ARRAY, UINT16, UINT32, ByteStream, GgufCursor
from nanorun.model.lookalikes import HEAD_BYTES, look_alike

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
KEY_ALIGNMENT = "general.alignment"
KEY_SPLIT_NO, KEY_SPLIT_COUNT = "split.no", "split.count"
KEY_SPLIT_TENSORS = "split.tensors.count"

# GGML_MAX_NAME and GGML_MAX_DIMS of ggml.h; the name's limit counts its final zero byte.
MAX_NAME_BYTES = 63
MAX_DIMS = 4

_SPLIT_NAME = re.compile(r"(.+)-00001-of-([0-9]{5})(\.(?i:gguf))")
_MIN_KEY_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8
_NEEDED_TYPES = {KEY_ALIGNMENT: UINT32, KEY_SPLIT_NO: UINT16}

T = TypeVar("T", str, int, float, bool, list[Any])


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor directory, checked."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    """Numpy order, outermost first; the file stores it reversed."""
    path: Path
    """The file that holds the data: that of the model, or one of those it is split into."""
    offset: int
    """First byte of the data, counted from the start of that file."""
    n_bytes: int

    @property
    def n_elements(self) -> int:
        """Numbers the tensor holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufPart:
    """One of the files that a GGUF lies in; usually the only one."""

    path: Path
    file_bytes: int
    data_offset: int
    """Where the data of its first tensor starts."""


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a GGUF says about itself, in one file or in several."""

    path: Path
    """The file, or the first of several; the engine opens all by it."""
    version: int
    alignment: int
    metadata: dict[str, Any]
    """Keys in file order; arrays are lists."""
    tensors: dict[str, TensorInfo]
    """By name, in file order, those of all parts."""
    parts: tuple[GgufPart, ...]

    @property
    def file_bytes(self) -> int:
        """Size of the file, or of all files together."""
        return sum(part.file_bytes for part in self.parts)

    @property
    def data_offset(self) -> int:
        """Bytes of the header, that of the first file: where the data of its tensors starts."""
        return self.parts[0].data_offset

    @property
    def architecture(self) -> str:
        """`general.architecture`, which prefixes the keys of the shape."""
        return self.require("general.architecture", str)

    @property
    def n_params(self) -> int:
        """Numbers in all tensors together."""
        return sum(t.n_elements for t in self.tensors.values())

    def find(self, key: str, kind: type[T]) -> T | None:
        """The value of `key`, or None where the file has no such key.

        Raises:
            ModelError: If the value is of another kind.
        """
        value = self.metadata.get(key)
        if value is None:
            return None
        # bool is an int to Python; to a GGUF they are different types.
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            found = type(value).__name__
            raise ModelError(f"{self.path}: key {key!r}: expected {kind.__name__}, found {found}")
        return value

    def require(self, key: str, kind: type[T]) -> T:
        """The value of `key`.

        Raises:
            ModelError: If the file has no such key, or its value is of another kind.
        """
        value = self.find(key, kind)
        if value is None:
            expected = f"expected {kind.__name__}, found no such key"
            raise ModelError(f"{self.path}: key {key!r}: {expected}")
        return value


def read_gguf(path: str | Path, *, check_data: bool = True) -> GgufFile:
    """Read and check the header of a GGUF file, or of all files of one that is split.

    Args:
        path: The file; of a split one, the first.
        check_data: Whether the file must hold the tensors' data; without, a file that ends after
            its header will do.

    Raises:
        ModelError: If a file is missing, is no GGUF, or contradicts itself or the others.
    """
    first = read_part(Path(path), check_data=check_data)

    def read_other(other: Path) -> GgufFile:
        if not other.exists():
            n_files = first.find(KEY_SPLIT_COUNT, int)
            raise ModelError(
                f"{other}: no such file", facts=[f"{first.path} is split into {n_files} files"]
            )
        return read_part(other, check_data=check_data)

    return join_parts(first, read_other)


def join_parts(first: GgufFile, read: Callable[[Path], GgufFile]) -> GgufFile:
    """The whole that a file is the first of; `read` reads the others.

    Raises:
        ModelError: If it is not the first, or the files contradict one another.
    """
    paths = _split_paths(first)
    if len(paths) == 1:
        return first
    files = [first]
    for i, other in enumerate(paths[1:], start=1):
        files.append(read(other))
        _check_number(files[-1], i, len(paths))
    return _joined(files)


def read_stream(stream: ByteStream, path: Path, file_bytes: int) -> GgufFile:
    """Read and check a header from wherever its bytes come from, in order.

    Args:
        stream: The file from its start on.
        path: What it is called in messages.
        file_bytes: Its size, which the tensors' data must keep to.

    Raises:
        ModelError: As `read_gguf`.
    """
    return _Reader(stream, path, file_bytes).read(True)


def read_part(path: Path, *, check_data: bool = True) -> GgufFile:
    """Read and check one file for itself, also where it is one of several.

    Raises:
        ModelError: As `read_gguf`.
    """
    try:
        file_bytes = path.stat().st_size
        if not path.is_file():
            raise ModelError(f"{path}: expected a GGUF file, found a folder or a device")
        with path.open("rb") as stream:
            return _Reader(stream, path, file_bytes).read(check_data)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error


def _split_paths(first: GgufFile) -> list[Path]:
    """The files of a GGUF, given the one that must be the first."""
    n_files = first.find(KEY_SPLIT_COUNT, int)
    if n_files in (None, 0, 1):
        return [first.path]
    path, number = first.path, first.require(KEY_SPLIT_NO, int)
    if number != 0:
        start = re.sub(r"-[0-9]{5}(-of-[0-9]{5}\.(?i:gguf))$", r"-00001\1", str(path))
        raise ModelError(
            f"{path} is file {number + 1} of the {n_files} that a model is split into",
            facts=[f"a split model is opened by its first file, {start}"],
        )
    named = _SPLIT_NAME.fullmatch(path.name)
    if named is None or int(named[2]) != n_files:
        expected = f"a name that ends in -00001-of-{n_files:05}.gguf"
        raise ModelError(f"{path}: key {KEY_SPLIT_COUNT!r}: {n_files} files: expected {expected}")
    return [
        path.with_name(f"{named[1]}-{i + 1:05}-of-{named[2]}{named[3]}") for i in range(n_files)
    ]


def _check_number(file: GgufFile, number: int, n_files: int) -> None:
    for key, expected in ((KEY_SPLIT_NO, number), (KEY_SPLIT_COUNT, n_files)):
        found = file.require(key, int)
        if found != expected:
            raise ModelError(f"{file.path}: key {key!r}: expected {expected}, found {found}")


def _joined(files: list[GgufFile]) -> GgufFile:
    """The files as one, which has the keys of the first."""
    first, tensors = files[0], dict[str, TensorInfo]()
    for file in files:
        for name, tensor in file.tensors.items():
            if name in tensors:
                there = tensors[name].path.name
                raise ModelError(f"{file.path}: tensor {name!r}: it is in {there} as well")
            tensors[name] = tensor
    n_tensors = first.require(KEY_SPLIT_TENSORS, int)
    if len(tensors) != n_tensors:
        raise ModelError(
            f"{first.path}: key {KEY_SPLIT_TENSORS!r}: expected {n_tensors} tensors in"
            f" {len(files)} files, found {len(tensors)}"
        )
    return replace(first, tensors=tensors, parts=tuple(p for file in files for p in file.parts))


class _Reader(GgufCursor):
    """Reads a header from its first byte to its last, and places the tensors."""

    __slots__ = ()

    def read(self, check_data: bool) -> GgufFile:
        version, n_tensors, n_keys = self._read_counts()
        metadata = self._read_metadata(n_keys)
        alignment = self._alignment(metadata)
        directory = [self._read_tensor() for _ in range(n_tensors)]
        self.where = "header"
        data_offset = _align(self.position, alignment) if n_tensors else self.position
        tensors = self._place(directory, data_offset, alignment, check_data)
        part = GgufPart(self.path, self.file_bytes, data_offset)
        return GgufFile(self.path, version, alignment, metadata, tensors, (part,))

    def _read_counts(self) -> tuple[int, int, int]:
        magic = self.take(4)
        if magic != MAGIC:
            self._refuse_magic(magic)
        version = self.number("I")
        if version not in (2, 3):
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            self.refuse("version 2 or 3", "a big-endian file" if big_endian else str(version))
        n_tensors, n_keys = self.number("Q"), self.number("Q")
        self.check_count("tensors", n_tensors, _MIN_TENSOR_BYTES)
        self.check_count("keys", n_keys, _MIN_KEY_BYTES)
        return version, n_tensors, n_keys

    def _refuse_magic(self, magic: bytes) -> NoReturn:
        rest = min(HEAD_BYTES, self.file_bytes) - len(magic)
        found = look_alike(magic + self.take(max(0, rest)), str(self.path))
        if found is None:
            self.refuse("magic 'GGUF'", repr(magic.decode("latin-1")))
        raise ModelError(
            f"{self.path}: {self.where}: expected a GGUF file, found {found.what}",
            facts=found.facts,
            tries=found.tries,
        )

    def _read_metadata(self, n_keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for i in range(n_keys):
            self.where = f"key {i} of {n_keys}"
            key = self.name("key", 65535)
            self.where = f"key {key!r}"
            if key in metadata:
                self.refuse("each key once", "it a second time")
            type_id = self.number("I")
            # The engine's process ends on another type of these two.
            needed = _NEEDED_TYPES.get(key, type_id)
            if type_id != needed:
                name = "u32" if needed == UINT32 else "u16"
                self.refuse(f"type {needed} ({name})", f"type {type_id}")
            metadata[key] = self.array() if type_id == ARRAY else self.value(type_id)
        return metadata

    def _read_tensor(self) -> tuple[str, GgmlType, tuple[int, ...], int]:
        self.where = "tensor directory"
        name = self.name("tensor", MAX_NAME_BYTES)
        self.where = f"tensor {name!r}"
        n_dims = self.number("I")
        if not 1 <= n_dims <= MAX_DIMS:
            self.refuse(f"1 to {MAX_DIMS} dimensions", str(n_dims))
        shape = tuple(self.number("Q") for _ in range(n_dims))[::-1]
        if 0 in shape or math.prod(shape) >= 2**63:
            self.refuse("dimensions from 1, fewer than 2^63 elements", f"shape {list(shape)}")
        return name, self._ggml_type(self.number("I")), shape, self.number("Q")

    def _ggml_type(self, type_id: int) -> GgmlType:
        try:
            return GgmlType(type_id)
        except ValueError:
            self.refuse("a known ggml type", f"type {type_id}")

    def _place(
        self,
        directory: list[tuple[str, GgmlType, tuple[int, ...], int]],
        data_offset: int,
        alignment: int,
        check_data: bool,
    ) -> dict[str, TensorInfo]:
        """Turn the directory into tensors, each where the one before it ends."""
        tensors: dict[str, TensorInfo] = {}
        expected = 0
        for name, type_, shape, offset in directory:
            self.where = f"tensor {name!r}"
            if name in tensors:
                self.refuse("each tensor once", "it a second time")
            if shape[-1] % type_.block_size:
                multiple = f"rows of a multiple of {type_.block_size} ({type_.label})"
                self.refuse(multiple, f"rows of {shape[-1]}")
            if offset != expected:
                problem = "an overlap" if offset < expected else "a gap"
                self.refuse(f"data at offset {expected}", f"{offset} ({problem})")
            n_bytes = math.prod(shape[:-1]) * type_.row_bytes(shape[-1])
            end = data_offset + offset + n_bytes
            # The engine counts in 64 bits, and the next tensor's alignment must fit in them too.
            if end >= 2**63 - alignment:
                self.refuse("data that ends before byte 2^63", f"an end at {end}")
            if check_data and end > self.file_bytes:
                size = f"a file of {self.file_bytes} bytes (it is truncated)"
                self.refuse(f"data up to byte {end}", size)
            at = data_offset + offset
            tensors[name] = TensorInfo(name, type_, shape, self.path, at, n_bytes)
            expected = _align(offset + n_bytes, alignment)
        return tensors

    def _alignment(self, metadata: dict[str, Any]) -> int:
        self.where = f"key {KEY_ALIGNMENT!r}"
        alignment: int = metadata.get(KEY_ALIGNMENT, DEFAULT_ALIGNMENT)
        if alignment == 0 or alignment & (alignment - 1):
            self.refuse("a power of two", str(alignment))
        return alignment


def _align(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment
