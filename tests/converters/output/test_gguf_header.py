"""The GGUF writer: what other readers find, and what is left when something goes wrong."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nanorun.errors import ModelError, NanorunError, UsageError
from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import read_gguf
from nanorun_converters.output.files import OutputFiles
from nanorun_converters.output.gguf_header import (
    Layout,
    TensorSlot,
    Value,
    boolean,
    f32,
    i32,
    lay_out,
    string,
    u32,
)

METADATA: dict[str, Value] = {
    "general.architecture": string("nemotron_h"),
    "a.count": u32(7),
    "a.counts": u32([1, 2, 3]),
    "a.negative": i32(-5),
    "a.types": i32([1, -1]),
    "a.eps": f32(1e-5),
    "a.flag": boolean(True),
    "a.texts": string(["é", "", "東京"]),
    "a.none": string([]),
}
SLOTS = [
    TensorSlot("first", GgmlType.F32, (2, 3), 24),
    TensorSlot("second", GgmlType.Q8_0, (2, 64), 136),
    TensorSlot("third", GgmlType.F16, (5,), 10),
]
DATA = [np.arange(slot.n_bytes, dtype=np.uint8) for slot in SLOTS]


def write(path: Path, layout: Layout, data: list[np.ndarray]) -> None:
    with OutputFiles([path], [layout]) as writer:
        for piece in data:
            writer.write(piece)
        writer.finish([layout.header])


def test_our_reader_finds_what_was_written(tmp_path: Path) -> None:
    layout = lay_out(METADATA, SLOTS)
    path = tmp_path / "model.gguf"
    write(path, layout, DATA)
    gguf = read_gguf(path)
    eps = gguf.metadata.pop("a.eps")
    assert eps == pytest.approx(1e-5)
    assert gguf.metadata == {
        "general.architecture": "nemotron_h",
        "a.count": 7,
        "a.counts": [1, 2, 3],
        "a.negative": -5,
        "a.types": [1, -1],
        "a.flag": True,
        "a.texts": ["é", "", "東京"],
        "a.none": [],
    }
    assert [(t.name, t.type, t.shape) for t in gguf.tensors.values()] == [
        (slot.name, slot.type, slot.shape) for slot in SLOTS
    ]
    raw = path.read_bytes()
    for tensor, data in zip(gguf.tensors.values(), DATA, strict=True):
        assert raw[tensor.offset : tensor.offset + tensor.n_bytes] == data.tobytes()


def test_the_gguf_package_finds_what_was_written(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    write(path, lay_out(METADATA, SLOTS), DATA)
    reader = gguf.GGUFReader(path)
    assert reader.fields["a.count"].contents() == 7
    assert reader.fields["a.texts"].contents() == ["é", "", "東京"]
    assert reader.fields["a.flag"].contents() is True
    assert [t.name for t in reader.tensors] == ["first", "second", "third"]
    assert [list(t.shape) for t in reader.tensors] == [[3, 2], [64, 2], [5]]
    assert [t.data.tobytes() for t in reader.tensors] == [data.tobytes() for data in DATA]


def test_size_is_predicted_to_the_byte(tmp_path: Path) -> None:
    layout = lay_out(METADATA, SLOTS)
    path = tmp_path / "model.gguf"
    write(path, layout, DATA)
    assert path.stat().st_size == layout.file_bytes


def test_pieces_of_any_size_give_the_same_file(tmp_path: Path) -> None:
    layout = lay_out(METADATA, SLOTS)
    write(tmp_path / "whole.gguf", layout, DATA)
    pieces = [data[i : i + 7] for data in DATA for i in range(0, data.size, 7)]
    write(tmp_path / "pieces.gguf", layout, pieces)
    assert (tmp_path / "pieces.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_header_is_replaced_by_the_final_one(tmp_path: Path) -> None:
    layout = lay_out({"hash": string("0" * 64)}, SLOTS[:1])
    final = lay_out({"hash": string("f" * 64)}, SLOTS[:1])
    with OutputFiles([tmp_path / "model.gguf"], [layout]) as writer:
        writer.write(DATA[0])
        writer.finish([final.header])
    assert read_gguf(tmp_path / "model.gguf").metadata["hash"] == "f" * 64


def test_name_appears_only_when_the_file_is_whole(tmp_path: Path) -> None:
    layout = lay_out(METADATA, SLOTS)
    path = tmp_path / "model.gguf"
    with OutputFiles([path], [layout]) as writer:
        writer.write(DATA[0])
        names = sorted(p.name for p in tmp_path.iterdir())
        assert names == ["model.gguf.part", "model.gguf.part.json"]
        writer.write(DATA[1])
        writer.write(DATA[2])
        assert not path.exists()
        writer.finish([layout.header])
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("error", [RuntimeError("worker"), ModelError("tensor")])
def test_nothing_is_left_when_the_work_fails(error: BaseException, tmp_path: Path) -> None:
    with (
        pytest.raises(type(error)),
        OutputFiles([tmp_path / "model.gguf"], [lay_out(METADATA, SLOTS)]) as writer,
    ):
        writer.write(DATA[0])
        raise error
    assert not list(tmp_path.iterdir())


def test_existing_file_survives_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), OutputFiles([path], [lay_out(METADATA, SLOTS)]):
        raise RuntimeError
    assert path.read_bytes() == b"old"


def test_unfinished_file_cannot_be_finished(tmp_path: Path) -> None:
    layout = lay_out(METADATA, SLOTS)
    with OutputFiles([tmp_path / "model.gguf"], [layout]) as writer:
        writer.write(DATA[0])
        with pytest.raises(ValueError, match="not whole"):
            writer.finish([layout.header])


def test_more_data_than_the_tensor_takes_is_a_mistake(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="25 bytes"),
        OutputFiles([tmp_path / "model.gguf"], [lay_out(METADATA, SLOTS)]) as writer,
    ):
        writer.write(np.zeros(25, np.uint8))


def test_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: OutputFiles, data: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    layout = lay_out(METADATA, SLOTS)
    with (
        pytest.raises(NanorunError, match=r"model\.gguf cannot be written: no space left"),
        OutputFiles([tmp_path / "model.gguf"], [layout]) as writer,
    ):
        monkeypatch.setattr(OutputFiles, "_put", refuse)
        writer.write(DATA[0])
    assert not list(tmp_path.iterdir())


def test_folder_that_may_not_be_written_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(NanorunError, match="cannot be written: no such file"),
        OutputFiles([tmp_path / "gone" / "model.gguf"], [lay_out(METADATA, SLOTS)]),
    ):
        pass


def test_part_left_by_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "model.gguf.part").write_bytes(b"x" * 10_000)
    layout = lay_out(METADATA, SLOTS)
    write(tmp_path / "model.gguf", layout, DATA)
    assert (tmp_path / "model.gguf").stat().st_size == layout.file_bytes
    assert not (tmp_path / "model.gguf.part").exists()


HOLD = """
import fcntl, sys
with open(sys.argv[1], "wb") as stream:
    fcntl.flock(stream, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="locks files another way")
def test_part_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    part = tmp_path / "model.gguf.part"
    command = [sys.executable, "-c", HOLD, str(part)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        with (
            pytest.raises(UsageError, match="another process is writing"),
            OutputFiles([tmp_path / "model.gguf"], [lay_out(METADATA, SLOTS)]),
        ):
            pass
        assert part.exists()
        other.communicate(b"")


def test_text_that_is_no_unicode_is_refused_by_key() -> None:
    with pytest.raises(ModelError, match=r"a\.text: a text that is no valid Unicode"):
        lay_out({"a.text": string("\ud800")}, [])
