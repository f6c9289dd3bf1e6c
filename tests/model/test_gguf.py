from __future__ import annotations

import re
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import pytest

from nanorun.errors import ModelError
from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import read_gguf
from nanorun.model.gguf_cursor import MAX_ARRAY_ELEMENTS, MAX_STRING_BYTES
from tests.support.builders import Raw, Tensor, gguf_string, write_gguf

F32, Q8_0, Q4_K = GgmlType.F32, GgmlType.Q8_0, GgmlType.Q4_K
KV = {"general.architecture": "nemotron_h", "some.list": [1, 2, 3]}
TENSORS = [Tensor("a.weight", F32, (3, 5)), Tensor("b.weight", Q8_0, (2, 64))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_reader_gives_values_and_tensors(path: Path) -> None:
    values: dict[str, Any] = {
        "s": "Füße 日本",
        "i": 7,
        "big": 2**40,
        "negative": -3,
        "f": 0.5,
        "yes": True,
        "no": False,
        "ints": [1, 2, 3],
        "floats": [0.5, -2.0],
        "bools": [True, False],
        "strings": ["", "a", "é"],
        "empty": [],
    }
    file = read_gguf(write_gguf(path, values, TENSORS))
    assert file.metadata == values
    assert [type(file.metadata[key]) for key in ("yes", "i", "f")] == [bool, int, float]
    assert list(file.tensors) == ["a.weight", "b.weight"]
    a, b = file.tensors.values()
    assert (a.type, a.shape, a.n_elements, a.n_bytes) == (F32, (3, 5), 15, 60)
    assert (b.type, b.shape, b.n_elements, b.n_bytes) == (Q8_0, (2, 64), 128, 136)
    assert (a.offset, b.offset) == (file.data_offset, file.data_offset + 64)
    assert file.data_offset % 32 == 0
    assert file.file_bytes == path.stat().st_size
    assert (file.version, file.alignment, file.n_params) == (3, 32, 143)


def test_reader_agrees_with_gguf_py(path: Path) -> None:
    writer = gguf_py.GGUFWriter(path, "nemotron_h")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_float64("f64", 1e300)
    writer.add_array("texts", ["x", "yz"])
    writer.add_custom_alignment(64)
    rng = np.random.default_rng(0)
    for name, shape in (("one", (5,)), ("two", (3, 4)), ("three", (2, 3, 4))):
        writer.add_tensor(name, rng.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file, other = read_gguf(path), gguf_py.GGUFReader(path)
    assert file.metadata == {
        key: value.contents() for key, value in other.fields.items() if not key.startswith("GGUF.")
    }
    assert file.alignment == 64
    for tensor in other.tensors:
        mine = file.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert (mine.offset, mine.n_bytes) == (tensor.data_offset, tensor.n_bytes)


def test_version_2_is_read(path: Path) -> None:
    assert read_gguf(write_gguf(path, KV, TENSORS, version=2)).version == 2


def test_file_without_tensors_is_read(path: Path) -> None:
    assert read_gguf(write_gguf(path, KV)).tensors == {}


def test_header_alone_is_enough_when_data_is_not_checked(path: Path) -> None:
    write_gguf(path, KV, TENSORS, with_data=False)
    assert list(read_gguf(path, check_data=False).tensors) == ["a.weight", "b.weight"]
    with pytest.raises(ModelError, match="it is truncated"):
        read_gguf(path)


def test_last_tensor_needs_no_padding_after_it(path: Path) -> None:
    write_gguf(path, KV, TENSORS)
    path.write_bytes(path.read_bytes()[:-24])  # 136 bytes of data padded to 160
    assert read_gguf(path).tensors["b.weight"].n_bytes == 136
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"tensor 'b\.weight': expected data up to byte"):
        read_gguf(path)


def test_typed_access_says_what_is_wrong(path: Path) -> None:
    file = read_gguf(write_gguf(path, {"s": "x", "n": 1, "f": 1.5, "yes": True, "l": [1]}))
    assert file.require("s", str) == "x"
    assert file.require("l", list) == [1]
    assert file.find("none", int) is None
    with pytest.raises(ModelError, match=r"model\.gguf: key 's': expected int, found str"):
        file.find("s", int)
    with pytest.raises(ModelError, match="key 'yes': expected int, found bool"):
        file.require("yes", int)
    with pytest.raises(ModelError, match="key 'n': expected bool, found int"):
        file.require("n", bool)
    with pytest.raises(ModelError, match="key 'none': expected float, found no such key"):
        file.require("none", float)
    with pytest.raises(ModelError, match=r"general\.architecture"):
        _ = file.architecture


def test_large_vocabulary_costs_three_calls_a_string(path: Path) -> None:
    tokens = [f"Ġtoken{i}" for i in range(131072)]
    write_gguf(path, {"tokens": tokens, "types": [1] * 131072})
    n_calls = 0

    def count(_frame: object, event: str, _arg: object) -> None:
        nonlocal n_calls
        n_calls += event == "call"

    sys.setprofile(count)
    try:
        file = read_gguf(path)
    finally:
        sys.setprofile(None)
    assert file.metadata["tokens"] == tokens
    assert n_calls < 3 * 131072 + 1000  # room is made for its length and its bytes; it is decoded


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected 4 bytes at byte 0, found a file of 0 bytes"),
        (b"GG", "expected 4 bytes at byte 0, found a file of 2 bytes"),
        (b"GGUF", "expected 4 bytes at byte 4"),
        (b"PK\x03\x04" + bytes(40), "expected a GGUF file, found a zip archive"),
        (b"PKZ!" + bytes(40), "expected magic 'GGUF', found 'PKZ!'"),
        (b"GGUF" + bytes([0, 0, 0, 3]) + bytes(16), "found a big-endian file"),
    ],
)
def test_what_is_no_gguf_is_refused(content: bytes, message: str, path: Path) -> None:
    path.write_bytes(content)
    assert_refused(path, message)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.gguf", "none.gguf: No such file or directory")
    assert_refused(tmp_path, "found a folder or a device")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "expected version 2 or 3, found 1"),
        ({"version": 4}, "expected version 2 or 3, found 4"),
        ({"n_kv": 2**63}, "keys in a file of"),
        ({"n_tensors": 2**60}, "tensors in a file of"),
        ({"n_kv": 1}, "tensor 'b': expected"),
        ({"n_tensors": 3}, "tensor directory"),
    ],
)
def test_wrong_counts_are_refused(changes: dict[str, Any], message: str, path: Path) -> None:
    kv = {"a": 1, "b": 2}
    assert_refused(write_gguf(path, kv, TENSORS, **changes), message)


NO_TEXT = Raw(8, struct.pack("<Q", 2) + b"\xff\xfe")
NESTED = Raw(9, struct.pack("<IQ", 9, 1) + struct.pack("<IQI", 4, 1, 7))


def array_of(type_id: int, n: int, payload: bytes = b"") -> Raw:
    return Raw(9, struct.pack("<IQ", type_id, n) + payload)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("k", Raw(13, bytes(8)), "key 'k': expected a value type from 0 to 12, found 13"),
        ("k", Raw(8, struct.pack("<Q", 2**62)), f"at most {MAX_STRING_BYTES} bytes"),
        ("k", Raw(8, struct.pack("<Q", 2**20)), "key 'k': expected 1048576 bytes at byte"),
        ("k", NO_TEXT, "key 'k': expected text in UTF-8"),
        ("k", NESTED, "key 'k': expected an array of values, found an array of arrays"),
        ("k", array_of(13, 1, b"1"), "expected a value type from 0 to 12, found 13"),
        ("k", array_of(4, 2**61), f"expected at most {MAX_ARRAY_ELEMENTS} elements"),
        ("k", array_of(4, 2**22), "key 'k': expected 16777216 bytes"),
        ("k", array_of(8, 2**22), "strings in a file of"),
        ("k", array_of(8, 1, struct.pack("<Q", 2**40)), "expected a string of at most"),
        ("k", array_of(8, 1, gguf_string(b"\x80")), "key 'k': expected text in UTF-8"),
        ("k", Raw(7, b"\x02"), "key 'k': expected a truth value of 0 or 1, found 2"),
        ("k", array_of(7, 2, b"\x01\x09"), "expected a truth value of 0 or 1, found 9"),
        ("", 1, "expected a printable key name, found ''"),
        ("a\nb", 1, "expected a printable key name"),
        (b"\xc3", 1, "expected text in UTF-8"),
        ("k" * 65536, 1, "expected a string of at most 65535 bytes"),
        ("general.alignment", 48, "expected a power of two, found 48"),
        ("general.alignment", 0, "expected a power of two, found 0"),
        ("general.alignment", "32", "expected type 4 (u32), found type 8"),
        ("general.alignment", 2**31, "tensor 'a.weight': expected data up to byte"),
    ],
)
def test_bad_metadata_is_refused(key: str | bytes, value: Any, message: str, path: Path) -> None:
    assert_refused(write_gguf(path, [(key, value)], TENSORS), message)


def test_key_given_twice_is_refused(path: Path) -> None:
    write_gguf(path, [("k", 1), ("k", 2)])
    assert_refused(path, "key 'k': expected each key once, found it a second time")


GOOD = Tensor("good", F32, (8,))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([GOOD, GOOD], "tensor 'good': expected each tensor once"),
        ([Tensor("", F32, (8,))], "expected a printable tensor name"),
        ([Tensor("a\0b", F32, (8,))], "expected a printable tensor name"),
        ([Tensor("x" * 64, F32, (8,))], "expected a string of at most 63 bytes, found 64"),
        ([Tensor("t", F32, (), b"")], "tensor 't': expected 1 to 4 dimensions, found 0"),
        ([Tensor("t", F32, (1,) * 5)], "tensor 't': expected 1 to 4 dimensions, found 5"),
        ([Tensor("t", F32, (8, 0), b"")], "dimensions from 1, fewer than 2^63 elements"),
        ([Tensor("t", F32, (2**32, 2**31), b"")], "found shape [4294967296, 2147483648]"),
        ([Tensor("t", F32, (2**64 - 1,), b"")], "fewer than 2^63 elements"),
        ([Tensor("t", F32, (2**61,), b"")], "expected data that ends before byte 2^63"),
        ([Tensor("t", F32, (2**50,), b"")], "tensor 't': expected data up to byte"),
        ([Tensor("t", 4, (32,), b"")], "expected a known ggml type, found type 4"),
        ([Tensor("t", 43, (32,), b"")], "expected a known ggml type, found type 43"),
        ([Tensor("t", 2**31, (32,), b"")], "expected a known ggml type"),
        ([Tensor("t", Q8_0, (2, 33), b"")], "rows of a multiple of 32 (q8_0), found rows of 33"),
        ([Tensor("t", Q4_K, (4, 64), b"")], "rows of a multiple of 256 (q4_k), found rows of 64"),
        ([GOOD, Tensor("t", F32, (8,), offset=0)], "data at offset 32, found 0 (an overlap)"),
        ([GOOD, Tensor("t", F32, (8,), offset=16)], "data at offset 32, found 16 (an overlap)"),
        ([GOOD, Tensor("t", F32, (8,), offset=64)], "data at offset 32, found 64 (a gap)"),
        ([Tensor("t", F32, (8,), offset=2**64 - 32)], "data at offset 0"),
        ([GOOD, Tensor("t", F32, (80,), bytes(32))], "tensor 't': expected data up to byte"),
    ],
)
def test_bad_tensors_are_refused(tensors: list[Tensor], message: str, path: Path) -> None:
    assert_refused(write_gguf(path, KV, tensors), message)


def test_sizes_beyond_64_bits_are_refused_without_data_too(path: Path) -> None:
    write_gguf(path, KV, [Tensor("t", F32, (2**62,), b"")])
    with pytest.raises(ModelError, match=r"tensor 't': expected data that ends before byte 2\^63"):
        read_gguf(path, check_data=False)


def test_huge_claims_in_a_large_file_cost_no_memory(path: Path) -> None:
    """A sparse file of 8 GiB makes 2^32 bytes of string and 2^29 numbers look possible."""
    claims = [Raw(8, struct.pack("<Q", 2**32)), array_of(4, 2**29), array_of(8, 2**29)]
    for claim in claims:
        write_gguf(path, {"k": claim})
        with path.open("r+b") as file:
            file.truncate(2**33)
        tracemalloc.start()
        try:
            assert_refused(path, "expected a")
            assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
        finally:
            tracemalloc.stop()


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        read_gguf(path)
    assert path.name in caught.value.message
