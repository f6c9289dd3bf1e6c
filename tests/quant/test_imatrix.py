"""Importance matrices: files in and out, and the weights read from them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from nanorun.errors import ModelError
from nanorun_quant.imatrix import Entry, Imatrix, per_expert
from nanorun_quant.imatrix_file import read_imatrix, write_imatrix

NAME, EXPERTS = "blk.0.ssm_in.weight", "blk.1.ffn_up_exps.weight"


@pytest.fixture
def imatrix() -> Imatrix:
    rng = np.random.default_rng(0)
    entries = {
        NAME: Entry(rng.uniform(0, 9, (1, 64)).astype(np.float32), np.array([7])),
        EXPERTS: Entry(rng.uniform(0, 9, (3, 64)).astype(np.float32), np.array([4, 0, 3])),
    }
    return Imatrix(entries, ("text.txt",), 512, 5, "i.gguf", "ab" * 32)


def test_written_file_reads_back(imatrix: Imatrix, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", imatrix)
    found = read_imatrix(tmp_path / "i.gguf")
    assert found.datasets == ("text.txt",)
    assert (found.chunk_size, found.n_chunks, found.text_sha256) == (512, 5, "ab" * 32)
    assert found.entries.keys() == imatrix.entries.keys()
    for name, entry in imatrix.entries.items():
        np.testing.assert_array_equal(found.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(found.entries[name].counts, entry.counts)
    assert [path.name for path in tmp_path.iterdir()] == ["i.gguf"]


def test_written_file_is_one_that_gguf_py_reads(imatrix: Imatrix, tmp_path: Path) -> None:
    from gguf import GGUFReader

    write_imatrix(tmp_path / "i.gguf", imatrix)
    reader = GGUFReader(tmp_path / "i.gguf")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    np.testing.assert_array_equal(tensors[f"{EXPERTS}.in_sum2"], imatrix.entries[EXPERTS].sums)
    assert tensors[f"{EXPERTS}.counts"].reshape(-1).tolist() == [4, 0, 3]
    assert reader.get_field("imatrix.chunk_count").contents() == 5


def test_weights_are_means_and_unseen_experts_weigh_all_alike(imatrix: Imatrix) -> None:
    weights = imatrix.weights(EXPERTS, 2, 64)
    assert weights is not None
    np.testing.assert_allclose(weights, imatrix.entries[EXPERTS].sums[2] / 3, rtol=1e-6)
    assert (imatrix.weights(EXPERTS, 1, 64) == np.ones(64)).all()
    assert imatrix.weights("output.weight", 0, 64) is None


def test_padded_columns_weigh_nearly_nothing(imatrix: Imatrix) -> None:
    plain, padded = imatrix.weights(NAME, 0, 64), imatrix.weights(NAME, 0, 256)
    assert plain is not None and padded is not None
    np.testing.assert_array_equal(padded[:64], plain)
    assert 0 < padded[64:].max() < 1e-4 * plain.mean()


def test_imatrix_of_a_padded_model_serves_the_plain_one() -> None:
    sums = np.zeros((1, 256), np.float32)
    sums[0, :100] = np.arange(1, 101)
    imatrix = Imatrix({NAME: Entry(sums, np.array([2]))})
    weights = imatrix.weights(NAME, 0, 100)
    assert weights is not None
    np.testing.assert_allclose(weights, np.arange(1, 101) / 2)


def test_imatrix_of_another_model_is_refused(imatrix: Imatrix) -> None:
    with pytest.raises(ModelError, match="expected 96 columns, found 64"):
        imatrix.weights(NAME, 0, 96)


def legacy(entries: dict[str, tuple[int, np.ndarray]], tail: bytes = b"") -> bytes:
    raw = struct.pack("<i", len(entries))
    for name, (n_calls, values) in entries.items():
        raw += struct.pack("<i", len(name)) + name.encode()
        raw += struct.pack("<ii", n_calls, values.size) + values.astype("<f4").tobytes()
    return raw + tail


def test_older_form_is_read(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    values = np.arange(1, 9)
    tail = struct.pack("<ii", 6, 5) + b"a.txt"
    path.write_bytes(legacy({NAME: (2, values), EXPERTS: (4, values)}, tail))
    imatrix = per_expert(read_imatrix(path), {EXPERTS: 2})
    assert (imatrix.n_chunks, imatrix.datasets) == (6, ("a.txt",))
    np.testing.assert_allclose(imatrix.weights(NAME, 0, 8), values / 2)
    np.testing.assert_allclose(imatrix.weights(EXPERTS, 1, 4), values[4:] / 4)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x01\0",
        struct.pack("<i", -1),
        struct.pack("<ii", 1, 9999),
        legacy({NAME: (2, np.ones(8))})[:-3],
        b"GGUF" + bytes(20),
    ],
    ids=["empty", "short", "negative", "long name", "cut", "bad gguf"],
)
def test_damaged_file_is_refused(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(raw)
    with pytest.raises(ModelError, match=r"i\.dat"):
        read_imatrix(path)


def test_numbers_that_are_no_squares_are_refused(imatrix: Imatrix, tmp_path: Path) -> None:
    imatrix.entries[NAME].sums[0, 3] = np.nan
    write_imatrix(tmp_path / "i.gguf", imatrix)
    with pytest.raises(ModelError, match=r"ssm_in\.weight\.in_sum2: expected finite numbers"):
        read_imatrix(tmp_path / "i.gguf")


def test_merging_adds_sums_and_counts(imatrix: Imatrix) -> None:
    total = Imatrix()
    inputs = np.full((3, 64), 2, np.float32)
    for _ in range(2):
        part = Imatrix()
        part.add(NAME, 0, 1, inputs)
        total.merge(part)
    assert total.entries[NAME].counts.tolist() == [6]
    np.testing.assert_allclose(total.weights(NAME, 0, 64), 4)


def test_sensitivity_is_kept_and_checked(imatrix: Imatrix, tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    imatrix.sensitivity = {NAME: 0.25, "output.weight": 0.0}
    write_imatrix(path, imatrix)
    assert read_imatrix(path).sensitivity == imatrix.sensitivity
    for number in (-1.0, np.inf, np.nan):
        imatrix.sensitivity = {NAME: number}
        write_imatrix(path, imatrix)
        with pytest.raises(ModelError, match=r"imatrix\.sensitivity': expected NAME=NUMBER"):
            read_imatrix(path)


def test_shares_follow_the_counts(imatrix: Imatrix) -> None:
    counts = imatrix.entries[EXPERTS].counts
    assert imatrix.shares(EXPERTS, len(counts)) == pytest.approx(list(counts / counts.sum()))
    assert imatrix.shares(NAME, 3) == [1 / 3] * 3
    assert imatrix.shares("unknown", 2) == [0.5, 0.5]
