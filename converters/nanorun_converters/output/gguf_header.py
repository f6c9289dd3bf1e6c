"""The header of a GGUF file, encoded before any data is there, so that sizes are known to the byte.

A model may be split over several files, as llama.cpp does it: the first holds the metadata, each
says which of how many it is, and no tensor is cut.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from nanorun.errors import ModelError, UsageError
from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import DEFAULT_ALIGNMENT, MAGIC

VERSION = 3


class ValueType(IntEnum):
    """Types of a metadata value that nanorun writes, with the format's ids."""

    U16 = 2
    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9


_FORMATS = {
    ValueType.U16: "<H",
    ValueType.U32: "<I",
    ValueType.I32: "<i",
    ValueType.F32: "<f",
    ValueType.BOOL: "<?",
}
MAX_SPLITS = 2**16 - 1

Scalar = int | float | bool | str


@dataclass(frozen=True, slots=True)
class Value:
    """A metadata value and how it is stored."""

    type: ValueType
    """Of the value, or of each element of an array."""
    content: Scalar | Sequence[Scalar]

    def encode(self) -> bytes:
        """The bytes after the key's name."""
        if isinstance(self.content, (str, int, float)):
            return struct.pack("<I", self.type) + _encode_scalar(self.type, self.content)
        head = struct.pack("<IIQ", ValueType.ARRAY, self.type, len(self.content))
        return head + b"".join(_encode_scalar(self.type, element) for element in self.content)


@dataclass(frozen=True, slots=True)
class RawValue:
    """A metadata value that another file holds, with its type, byte by byte."""

    raw: bytes

    def encode(self) -> bytes:
        """The bytes after the key's name."""
        return self.raw


AnyValue = Value | RawValue


def u16(content: int) -> Value:
    """A small number from 0."""
    return Value(ValueType.U16, content)


def u32(content: int | Sequence[int]) -> Value:
    """A number from 0, or an array of them."""
    return Value(ValueType.U32, content)


def i32(content: int | Sequence[int]) -> Value:
    """A signed number, or an array of them."""
    return Value(ValueType.I32, content)


def f32(content: float) -> Value:
    """A float."""
    return Value(ValueType.F32, content)


def boolean(content: bool | Sequence[bool]) -> Value:
    """A truth value, or an array of them."""
    return Value(ValueType.BOOL, content)


def string(content: str | Sequence[str]) -> Value:
    """Text, or an array of texts."""
    return Value(ValueType.STRING, content)


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """One entry of the tensor directory."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    """Numpy order; the file stores it reversed."""
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The exact bytes of a file up to its data, and how the data follows."""

    header: bytes
    slots: tuple[TensorSlot, ...]

    @property
    def file_bytes(self) -> int:
        """Size of the finished file."""
        return len(self.header) + sum(padded_bytes(slot.n_bytes) for slot in self.slots)


def lay_out(metadata: Mapping[str, AnyValue], slots: Sequence[TensorSlot]) -> Layout:
    """Encode the header for `slots`, whose data follows in that order."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(slots), len(metadata))]
    parts += [_encode_pair(key, value) for key, value in metadata.items()]
    offset = 0
    for slot in slots:
        parts.append(_encode_slot(slot, offset))
        offset += padded_bytes(slot.n_bytes)
    header = b"".join(parts)
    return Layout(header.ljust(padded_bytes(len(header)), b"\0"), tuple(slots))


def lay_out_split(
    metadata: Mapping[str, AnyValue], slots: Sequence[TensorSlot], max_bytes: int
) -> list[Layout]:
    """Lay out as few files as needed to keep each within `max_bytes`; one is not split at all.

    Raises:
        UsageError: If a tensor alone is larger, or there would be more files than can be counted.
    """
    whole = lay_out(metadata, slots)
    if whole.file_bytes <= max_bytes:
        return [whole]
    empty = lay_out({**metadata, **_split_keys(0, 0, 0)}, [])
    groups = _groups(slots, len(empty.header), max_bytes)
    if len(groups) > MAX_SPLITS:
        raise UsageError(f"--split-max-size {max_bytes}: {len(groups)} files are too many")
    layouts = []
    for i, group in enumerate(groups):
        keys = _split_keys(i, len(groups), len(slots))
        layouts.append(lay_out({**metadata, **keys} if i == 0 else keys, group))
    return layouts


def split_paths(path: Path, n_files: int) -> list[Path]:
    """What llama.cpp calls the files that `path` is split into; it opens all by the first."""
    if n_files == 1:
        return [path]
    stem = path.name.removesuffix(".gguf")
    return [path.with_name(f"{stem}-{i + 1:05}-of-{n_files:05}.gguf") for i in range(n_files)]


def _groups(
    slots: Sequence[TensorSlot], first_bytes: int, max_bytes: int
) -> list[list[TensorSlot]]:
    """The tensors of each file, in order, as many as fit."""
    later_bytes = len(lay_out(_split_keys(0, 0, 0), []).header)
    groups: list[list[TensorSlot]] = [[]]
    head_bytes, data_bytes = first_bytes, 0
    for slot in slots:
        entry = len(_encode_slot(slot, 0))
        n_bytes = padded_bytes(slot.n_bytes)
        if groups[-1] and padded_bytes(head_bytes + entry) + data_bytes + n_bytes > max_bytes:
            groups.append([])
            head_bytes, data_bytes = later_bytes, 0
        groups[-1].append(slot)
        head_bytes += entry
        data_bytes += n_bytes
        least = padded_bytes(head_bytes) + data_bytes
        if least > max_bytes:
            raise UsageError(
                f"--split-max-size {max_bytes} is too small: {slot.name} alone makes a file of"
                f" {least} bytes",
                facts=["no tensor can be cut in two"],
            )
    return groups


def _split_keys(i_file: int, n_files: int, n_tensors: int) -> dict[str, Value]:
    return {
        "split.no": u16(i_file),
        "split.count": u16(n_files),
        "split.tensors.count": i32(n_tensors),
    }


def padded_bytes(n_bytes: int) -> int:
    """`n_bytes` rounded up to the alignment of tensor data."""
    return -(-n_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _encode_slot(slot: TensorSlot, offset: int) -> bytes:
    shape = slot.shape[::-1]
    entry = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, slot.type, offset)
    return _encode_string(slot.name) + entry


def _encode_pair(key: str, value: AnyValue) -> bytes:
    try:
        return _encode_string(key) + value.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which is no character.
        raise ModelError(f"{key}: a text that is no valid Unicode", facts=[str(error)]) from error


def _encode_scalar(type_: ValueType, value: Scalar) -> bytes:
    if isinstance(value, str):
        return _encode_string(value)
    return struct.pack(_FORMATS[type_], value)


def _encode_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
