"""Damaged files: whatever happens to the bytes, only `ModelError` may come of it, and soon."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorun.errors import ModelError
from nanorun.model.gguf import read_gguf
from nanorun.model.gguf_arch import arch_from_gguf
from nanorun.model.tensor_roles import check_tensors
from tests.model.known_archs import TINY_LATENT_MTP
from tests.support.builders import arch_tensors, gguf_metadata, write_gguf
from tests.support.waiting import little_work

EXTREMES = [0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "good.gguf"
    return write_gguf(path, gguf_metadata(TINY_LATENT_MTP), arch_tensors(TINY_LATENT_MTP))


def header_bytes(good: Path) -> int:
    return read_gguf(good).data_offset


def open_damaged(good: Path, content: bytes) -> None:
    """Do all that opening a model does before the engine sees it."""
    path = good.with_name("damaged.gguf")
    path.write_bytes(content)
    with little_work(cpu_s=3):
        try:
            file = read_gguf(path)
            check_tensors(file, arch_from_gguf(file))
        except ModelError as error:
            assert path.name in error.message


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_bytes_raise_model_error_at_most(good: Path, data: st.DataObject) -> None:
    content = bytearray(good.read_bytes())
    places = st.integers(0, header_bytes(good) - 1)
    changes = data.draw(
        st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8), label="changes"
    )
    for place, value in changes:
        content[place] = value
    open_damaged(good, bytes(content))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_extreme_numbers_raise_model_error_at_most(good: Path, data: st.DataObject) -> None:
    content = bytearray(good.read_bytes())
    place = data.draw(st.integers(4, header_bytes(good) - 8), label="place")
    number = data.draw(st.sampled_from(EXTREMES), label="number")
    if data.draw(st.booleans(), label="64 bits"):
        struct.pack_into("<Q", content, place, number)
    else:
        struct.pack_into("<I", content, place, number % 2**32)
    open_damaged(good, bytes(content))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_cut_files_are_always_refused(good: Path, data: st.DataObject) -> None:
    content = good.read_bytes()
    # The last tensor has no padding after it, so every byte of the file counts.
    n_kept = data.draw(st.integers(0, len(content) - 1), label="bytes kept")
    path = good.with_name("cut.gguf")
    path.write_bytes(content[:n_kept])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        read_gguf(path)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_bytes_inserted_or_removed_raise_model_error_at_most(
    good: Path, data: st.DataObject
) -> None:
    content = good.read_bytes()
    place = data.draw(st.integers(0, header_bytes(good)), label="place")
    n_removed = data.draw(st.integers(0, 16), label="removed")
    inserted = data.draw(st.binary(max_size=16), label="inserted")
    open_damaged(good, content[:place] + inserted + content[place + n_removed :])
