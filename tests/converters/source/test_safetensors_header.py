"""The safetensors header reader: good files, and one fault a test."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorun.errors import ModelError
from nanorun_converters.source.safetensors_header import TensorEntry, read_header

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def file_of(directory: Any, data: bytes = bytes(24)) -> bytes:
    header = directory if isinstance(directory, bytes) else json.dumps(directory).encode()
    return len(header).to_bytes(8, "little") + header + data


def read(raw: bytes) -> dict[str, TensorEntry]:
    return read_header(io.BytesIO(raw), len(raw), "bad.safetensors")


def test_header_gives_each_tensor_its_place() -> None:
    directory = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "a": ENTRY,
    }
    raw = file_of(directory, bytes(32))
    data_offset = len(raw) - 32
    assert read(raw) == {
        "a": TensorEntry("a", "F32", (2, 3), data_offset, 24),
        "b": TensorEntry("b", "BF16", (4,), data_offset + 24, 8),
    }


def test_scalars_and_empty_tensors_are_allowed() -> None:
    entries = {
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [4, 4]},
    }
    assert read(file_of(entries, bytes(4)))["empty"].n_bytes == 0


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "a file of 0 bytes"),
    "header longer than the file": ((2**40).to_bytes(8, "little") + b"{}", "at most 2 bytes"),
    "header over the limit": ((2**63).to_bytes(8, "little") + b"{}", "found one of"),
    "no JSON": (file_of(b"{oops"), "no valid JSON"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "no valid JSON"),
    "nested too deep": (file_of(b"[" * 200_000), "no valid JSON"),
    "number too long": (file_of(b'{"a": ' + b"9" * 10_000 + b"}"), "no valid JSON"),
    "no object": (file_of([1, 2]), "a JSON object as header, found list"),
    "name twice": (
        file_of(b'{"a": {}, "a": {}}'), "no valid JSON",
    ),
    "entry is no object": (file_of({"a": 3}), "tensor 'a': expected an object"),
    "unknown dtype": (file_of({"a": {**ENTRY, "dtype": "F31"}}), "found 'F31'"),
    "shape is no list": (file_of({"a": {**ENTRY, "shape": "2,3"}}), "expected a shape"),
    "negative size": (file_of({"a": {**ENTRY, "shape": [-2, -3]}}), "expected a shape"),
    "fractional size": (file_of({"a": {**ENTRY, "shape": [2.0, 3]}}), "expected a shape"),
    "truth value as size": (file_of({"a": {**ENTRY, "shape": [True, 6]}}), "expected a shape"),
    "enormous size": (file_of({"a": {**ENTRY, "shape": [2**62, 4]}}), "expected a shape"),
    "too many sizes": (file_of({"a": {**ENTRY, "shape": [1] * 9}}), "expected a shape"),
    "one offset": (file_of({"a": {**ENTRY, "data_offsets": [24]}}), "two data_offsets"),
    "offsets reversed": (file_of({"a": {**ENTRY, "data_offsets": [24, 0]}}), "24 bytes for F32"),
    "size contradicts shape": (file_of({"a": {**ENTRY, "shape": [2, 4]}}), "32 bytes for F32"),
    "truncated": (file_of({"a": ENTRY}, bytes(23)), "(it is truncated)"),
    "bytes after the last tensor": (file_of({"a": ENTRY}, bytes(25)), "(there is more in it)"),
    "gap": (
        file_of({"a": {**ENTRY, "data_offsets": [8, 32]}}, bytes(32)), "(a gap)",
    ),
    "overlap": (
        file_of({"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 32]}}, bytes(32)), "(an overlap)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_file_is_refused_with_what_was_found(fault: str) -> None:
    raw, message = BAD_FILES[fault]
    with pytest.raises(ModelError) as caught:
        read(raw)
    assert caught.value.message.startswith("bad.safetensors: ")
    assert message in caught.value.message


def test_duplicate_name_is_named() -> None:
    with pytest.raises(ModelError) as caught:
        read(file_of(b'{"a": {}, "b": {}, "a": {}}'))
    assert "'a' is there more than once" in caught.value.facts[0]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_bytes_give_an_error_or_a_consistent_directory(
    data: st.DataObject,
) -> None:
    raw = bytearray(file_of({"a": ENTRY, "b": {**ENTRY, "data_offsets": [24, 48]}}, bytes(48)))
    for _ in range(data.draw(st.integers(1, 4))):
        i = data.draw(st.integers(0, len(raw) - 49))
        raw[i] = data.draw(st.integers(0, 255))
    try:
        entries = read(bytes(raw))
    except ModelError:
        return
    assert sum(entry.n_bytes for entry in entries.values()) == 48
    assert all(entry.offset + entry.n_bytes <= len(raw) for entry in entries.values())


def test_reader_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    np = pytest.importorskip("numpy")
    tensors = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.ones(5, np.float16)}
    path = tmp_path / "model.safetensors"
    numpy.save_file(tensors, path)
    raw = path.read_bytes()
    entries = read(raw)
    assert {name: entry.shape for name, entry in entries.items()} == {"x": (2, 3), "y": (5,)}
    x = entries["x"]
    assert raw[x.offset : x.offset + x.n_bytes] == tensors["x"].tobytes()
