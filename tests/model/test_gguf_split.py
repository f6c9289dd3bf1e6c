"""A GGUF in several files: read as one by the first, and refused by the part that is wrong."""

from __future__ import annotations

import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorun.errors import ModelError
from nanorun.model.gguf import read_gguf, read_part
from nanorun.model.gguf_arch import arch_from_gguf
from nanorun.model.tensor_roles import check_tensors
from tests.model.known_archs import TINY_LATENT_MTP
from tests.support.builders import Raw, Tensor, arch_tensors, gguf_metadata, write_gguf
from tests.support.waiting import little_work

N_FILES = 3
TENSORS = arch_tensors(TINY_LATENT_MTP)


def part_path(folder: Path, i: int, stem: str = "tiny") -> Path:
    return folder / f"{stem}-{i + 1:05}-of-{N_FILES:05}.gguf"


def tensors_of(i: int) -> list[Tensor]:
    bounds = [j * len(TENSORS) // N_FILES for j in range(N_FILES + 1)]
    return TENSORS[bounds[i] : bounds[i + 1]]


def u16(number: int) -> Raw:
    return Raw(2, struct.pack("<H", number))


def write_part(
    folder: Path, i: int, tensors: list[Tensor] | None = None, **changes: object
) -> None:
    keys: dict[str, Any] = {
        "split.no": i, "split.count": N_FILES, "split.tensors.count": len(TENSORS)
    }  # fmt: skip
    keys |= {f"split.{name}": value for name, value in changes.items()}
    if type(keys["split.no"]) is int:
        keys["split.no"] = u16(keys["split.no"])
    if i == 0:
        keys = gguf_metadata(TINY_LATENT_MTP) | keys
    keys = {key: value for key, value in keys.items() if value is not None}
    write_gguf(part_path(folder, i), keys, tensors_of(i) if tensors is None else tensors)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(N_FILES):
        write_part(tmp_path, i)
    return tmp_path


def test_parts_are_read_as_one(folder: Path) -> None:
    file = read_gguf(part_path(folder, 0))
    whole = read_gguf(write_gguf(folder / "whole.gguf", gguf_metadata(TINY_LATENT_MTP), TENSORS))
    assert [(t.name, t.shape, t.n_bytes) for t in file.tensors.values()] == [
        (t.name, t.shape, t.n_bytes) for t in whole.tensors.values()
    ]
    assert [part.path for part in file.parts] == [part_path(folder, i) for i in range(N_FILES)]
    assert file.file_bytes == sum(p.stat().st_size for p in folder.glob("tiny-*.gguf"))
    assert file.n_params == whole.n_params
    for i in range(N_FILES):
        first = tensors_of(i)[0].name
        assert isinstance(first, str)
        assert file.tensors[first].path == part_path(folder, i)
        assert file.tensors[first].offset == file.parts[i].data_offset
    check_tensors(file, arch_from_gguf(file))


def test_a_part_can_be_read_alone(folder: Path) -> None:
    part = read_part(part_path(folder, 1))
    assert list(part.tensors) == [t.name for t in tensors_of(1)]


def test_headers_are_enough_when_data_is_not_checked(folder: Path) -> None:
    for i in range(N_FILES):
        path = part_path(folder, i)
        path.write_bytes(path.read_bytes()[: read_part(path).data_offset])
    assert len(read_gguf(part_path(folder, 0), check_data=False).tensors) == len(TENSORS)
    with pytest.raises(ModelError, match="it is truncated"):
        read_gguf(part_path(folder, 0))


def test_later_part_names_the_first(folder: Path) -> None:
    with pytest.raises(ModelError, match="is file 2 of the 3 that a model is split into") as caught:
        read_gguf(part_path(folder, 1))
    assert str(part_path(folder, 0)) in caught.value.facts[0]


def test_missing_part_is_named(folder: Path) -> None:
    part_path(folder, 2).unlink()
    with pytest.raises(ModelError, match=r"tiny-00003-of-00003\.gguf: no such file") as caught:
        read_gguf(part_path(folder, 0))
    assert "split into 3 files" in caught.value.facts[0]


def test_first_part_of_another_name_is_refused(folder: Path) -> None:
    renamed = part_path(folder, 0).rename(folder / "model.gguf")
    with pytest.raises(ModelError, match=r"expected a name that ends in -00001-of-00003\.gguf"):
        read_gguf(renamed)


@pytest.mark.parametrize(
    ("i", "changes", "says"),
    [
        (1, {"no": 2}, r"00002-of-00003\.gguf: key 'split.no': expected 1, found 2"),
        (1, {"no": None}, "key 'split.no': expected int, found no such key"),
        (2, {"count": 4}, r"00003-of-00003\.gguf: key 'split.count': expected 3, found 4"),
        (2, {"count": None}, "'split.count': expected int, found no such key"),
        (0, {"count": 4}, "4 files: expected a name that ends in -00001-of-00004"),
        (0, {"count": -3}, "key 'split.count': -3 files"),
        (0, {"count": 2**40}, "1099511627776 files"),
        (0, {"count": "three"}, "key 'split.count': expected int, found str"),
        (0, {"no": "zero"}, r"key 'split.no': expected type 2 \(u16\), found type 8"),
        (0, {"tensors.count": 7}, "expected 7 tensors in 3 files, found"),
        (0, {"tensors.count": None}, "key 'split.tensors.count': expected int"),
    ],
)
def test_numbers_that_contradict_are_refused(
    i: int, changes: dict[str, object], says: str, folder: Path
) -> None:
    write_part(folder, i, **changes)
    with pytest.raises(ModelError, match=says):
        read_gguf(part_path(folder, 0))


def test_tensor_in_two_parts_is_refused(folder: Path) -> None:
    write_part(folder, 2, [*tensors_of(2), tensors_of(1)[0]])
    name = re.escape(str(tensors_of(1)[0].name))
    with pytest.raises(
        ModelError, match=rf"00003-of.*tensor '{name}': it is in tiny-00002-of-00003\.gguf as well"
    ):
        read_gguf(part_path(folder, 0))


def test_damage_is_reported_by_the_part_that_has_it(folder: Path) -> None:
    path = part_path(folder, 1)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelError, match=r"00002-of-00003\.gguf: tensor .*it is truncated"):
        read_gguf(part_path(folder, 0))


def test_split_of_one_file_is_a_file(tmp_path: Path) -> None:
    keys = {"split.no": u16(0), "split.count": 1, "split.tensors.count": 1}
    path = write_gguf(tmp_path / "any name.gguf", keys, [Tensor("a", 0, (4,))])
    assert len(read_gguf(path).parts) == 1


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_changed_bytes_raise_model_error_at_most(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("split")
    for i in range(N_FILES):
        write_part(folder, i)
    path = part_path(folder, data.draw(st.integers(0, N_FILES - 1), label="part"))
    content = bytearray(path.read_bytes())
    n_header = read_part(path).data_offset
    for _ in range(data.draw(st.integers(1, 4), label="changes")):
        place = data.draw(st.integers(0, n_header - 8), label="place")
        if data.draw(st.booleans(), label="a byte"):
            content[place] = data.draw(st.integers(0, 255), label="value")
        else:
            number = data.draw(st.sampled_from([0, 1, 3, 2**16, 2**31, 2**63]), label="number")
            struct.pack_into("<Q", content, place, number)
    path.write_bytes(content)
    with little_work(cpu_s=3):
        try:
            file = read_gguf(part_path(folder, 0))
            check_tensors(file, arch_from_gguf(file))
        except ModelError as error:
            assert "tiny-0000" in error.message
    shutil.rmtree(folder)


def test_truth_values_are_no_numbers_of_parts(folder: Path) -> None:
    write_part(folder, 0, count=Raw(7, b"\1"))
    with pytest.raises(ModelError, match=r"'split\.count': expected int, found bool"):
        read_gguf(part_path(folder, 0))


def test_parts_in_upper_case_are_read(folder: Path) -> None:
    for path in list(folder.iterdir()):
        path.rename(path.with_suffix(".GGUF"))
    first = folder / f"tiny-00001-of-{N_FILES:05}.GGUF"
    assert len(read_gguf(first).parts) == N_FILES
    second = folder / f"tiny-00002-of-{N_FILES:05}.GGUF"
    with pytest.raises(ModelError) as caught:
        read_gguf(second)
    assert first.name in caught.value.render()


def test_number_of_a_part_of_another_type_is_refused(folder: Path) -> None:
    write_part(folder, 1, no=Raw(4, struct.pack("<I", 1)))
    with pytest.raises(ModelError, match=r"key 'split\.no': expected type 2 \(u16\), found type 4"):
        read_gguf(part_path(folder, 0))
