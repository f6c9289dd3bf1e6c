"""Reading the header of a safetensors file that may be damaged or hostile.

Layout: u64 header length, a JSON object naming each tensor's dtype, shape and byte range, then the
data, which the ranges must cover exactly. Only the header is read here; a tensor's bytes are read
later, in pieces, through `source.py`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeGuard

from nanorun.errors import ModelError

# The format's own limit, that of the safetensors library.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 8
LENGTH_BYTES = 8

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
HALF_BYTE_DTYPES = ("F4",)
"""Two numbers a byte; the shape counts numbers."""


class Readable(Protocol):
    """What a header is read from."""

    def read(self, n_bytes: int, /) -> bytes:
        """The next `n_bytes`, fewer at the end."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """First byte, counted from the start of the file."""
    n_bytes: int


def read_header(stream: Readable, file_bytes: int, where: str) -> dict[str, TensorEntry]:
    """Read and check the directory of the file in `stream`.

    Args:
        stream: The file, at its start.
        file_bytes: Its size.
        where: What to call it in errors.

    Raises:
        ModelError: If it is no safetensors file, or contradicts itself or its size.
    """
    if file_bytes < LENGTH_BYTES:
        _refuse(where, "a header length of 8 bytes", f"a file of {file_bytes} bytes")
    header_bytes = int.from_bytes(stream.read(LENGTH_BYTES), "little")
    most = min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES)
    if header_bytes > most:
        _refuse(where, f"a header of at most {most} bytes", f"one of {header_bytes} bytes")
    directory = _parse(stream.read(header_bytes), where)
    directory.pop("__metadata__", None)
    data_offset = LENGTH_BYTES + header_bytes
    entries = [_entry(name, value, data_offset, where) for name, value in directory.items()]
    _check_cover(entries, data_offset, file_bytes, where)
    return {entry.name: entry for entry in entries}


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        directory = json.loads(raw, object_pairs_hook=_object_of_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: the header is no valid JSON", facts=[str(error)]) from error
    if not isinstance(directory, dict):
        _refuse(where, "a JSON object as header", type(directory).__name__)
    return directory


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} is there more than once")
    return values


def _entry(name: str, value: object, data_offset: int, where: str) -> TensorEntry:
    at = f"{where}: tensor {name!r}"
    if not isinstance(value, dict):
        _refuse(at, "an object of dtype, shape and data_offsets", repr(value)[:60])
    dtype, shape = value.get("dtype"), value.get("shape")
    known = (*DTYPE_BYTES, *HALF_BYTE_DTYPES)
    if not isinstance(dtype, str) or dtype not in known:
        _refuse(at, f"a dtype of {' '.join(known)}", repr(dtype)[:60])
    if not _is_list_of_counts(shape) or len(shape) > MAX_DIMS:
        _refuse(at, f"a shape of at most {MAX_DIMS} sizes", repr(shape)[:60])
    offsets = value.get("data_offsets")
    if not _is_list_of_counts(offsets) or len(offsets) != 2:
        _refuse(at, "two data_offsets", repr(offsets)[:60])
    first, end = offsets
    n_bytes = _data_bytes(math.prod(shape), dtype, at)
    if end - first != n_bytes:
        _refuse(at, f"{n_bytes} bytes for {dtype} of shape {shape}", f"bytes {first} to {end}")
    return TensorEntry(name, dtype, tuple(shape), data_offset + first, n_bytes)


def _data_bytes(n_elements: int, dtype: str, at: str) -> int:
    if dtype not in HALF_BYTE_DTYPES:
        return n_elements * DTYPE_BYTES[dtype]
    if n_elements % 2:
        _refuse(at, f"an even number of elements of {dtype}", str(n_elements))
    return n_elements // 2


def _is_list_of_counts(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list):
        return False
    return all(type(n) is int and 0 <= n < 2**48 for n in value)


def _check_cover(entries: list[TensorEntry], data_offset: int, file_bytes: int, where: str) -> None:
    """Each tensor must start where the one before ends, and the last where the file ends."""
    end = data_offset
    for entry in sorted(entries, key=lambda e: (e.offset, e.n_bytes)):
        if entry.offset != end:
            problem = "an overlap" if entry.offset < end else "a gap"
            at = f"{where}: tensor {entry.name!r}"
            _refuse(at, f"data at byte {end}", f"{entry.offset} ({problem})")
        end += entry.n_bytes
    if end != file_bytes:
        problem = "it is truncated" if file_bytes < end else "there is more in it"
        _refuse(where, f"a file of {end} bytes", f"{file_bytes} ({problem})")


def _refuse(where: str, expected: str, found: str) -> NoReturn:
    raise ModelError(f"{where}: expected {expected}, found {found}")
