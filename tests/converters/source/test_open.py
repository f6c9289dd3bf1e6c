"""Opening a source model: where its tensors lie, and what is refused."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest

from nanorun.errors import ModelError
from nanorun_converters.source.files import LocalFiles, local_file
from nanorun_converters.source.open import open_source
from nanorun_converters.source.source_model import decode, read_json
from tests.support.source_models import encode, write_json, write_source_model
from tests.support.waiting import PATIENCE_S

INDEX = "model.safetensors.index.json"


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_source(folder)
    return caught.value.message


def edit_index(folder: Path, name: str, file: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    write_json(folder / INDEX, index)


def test_leftover_of_macos_is_no_file_of_weights(tmp_path: Path) -> None:
    folder = write_source_model(tmp_path / "model", n_shards=1)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    tensors = open_source(folder).tensors.keys()
    for path in list(folder.iterdir()):
        (folder / f"._{path.name}").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    assert open_source(folder).tensors.keys() == tensors


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_byte_order_mark_is_no_part_of_the_text(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(codecs.BOM_UTF8 + b'{"a": 1}')
    store = local_file(path)
    assert store is not None
    assert read_json(store, name) == {"a": 1}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_by_its_name(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes("\ufeff{}".encode(encoding))
    store = local_file(path)
    assert store is not None
    with pytest.raises(ModelError, match=r"config\.json: expected text in UTF-8, found UTF-16"):
        read_json(store, str(path))


@pytest.mark.parametrize("n_shards", [1, 3])
def test_tensors_read_as_they_were_written(n_shards: int, tmp_path: Path) -> None:
    written: dict[str, np.ndarray] = {}
    folder = write_source_model(
        tmp_path / "model", n_shards=n_shards, dtype="F32", edit=written.update
    )
    source = open_source(folder)
    assert source.tensors.keys() == written.keys()
    assert len(source.stores) == n_shards
    for name, tensor in source.tensors.items():
        assert tensor.shape == written[name].shape
        found = tensor.read(0, tensor.n_elements).reshape(tensor.shape)
        np.testing.assert_array_equal(found, written[name])


def test_runs_of_elements_and_parts_are_slices(tmp_path: Path) -> None:
    written: dict[str, np.ndarray] = {}
    folder = write_source_model(
        tmp_path / "model", dtype="F32", stacked_experts=True, edit=written.update
    )
    name = "backbone.layers.1.mixer.experts.up_proj"
    stack = open_source(folder).tensors[name]
    np.testing.assert_array_equal(stack.read(100, 300), written[name].ravel()[100:300])
    expert = stack.part(2)
    assert expert.shape == written[name].shape[1:]
    np.testing.assert_array_equal(expert.read(0, expert.n_elements), written[name][2].ravel())


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_decoding_is_exact(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    torch_dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    values = np.random.default_rng(0).standard_normal(4096, dtype=np.float32)
    # Subnormals, zeros of both signs and the largest numbers, too.
    values[:6] = [0.0, -0.0, 1e-40, -6e-8, 65504.0, -1e-5]
    rounded = torch.tensor(values).to(torch_dtype)
    raw = np.frombuffer(encode(values, dtype), np.uint8)
    np.testing.assert_array_equal(decode(raw, dtype), rounded.float().numpy())


def test_snapshot_of_the_hub_cache_names_repository_and_revision(tmp_path: Path) -> None:
    folder = tmp_path / "models--nvidia--Nano-4B" / "snapshots" / "abc123"
    source = open_source(write_source_model(folder))
    assert (source.repository, source.revision) == ("nvidia/Nano-4B", "abc123")
    assert source.name == "Nano-4B"


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "found nothing there" in refused(tmp_path / "nowhere")


def test_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "the folder of a source model, found a file" in refused(tmp_path / "model.gguf")


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert "found no safetensors file" in refused(tmp_path)


def test_shards_without_an_index_are_refused(tmp_path: Path) -> None:
    folder = write_source_model(tmp_path / "model", n_shards=2)
    (folder / INDEX).unlink()
    assert "2 safetensors files and no index" in refused(folder)


def test_shard_that_the_index_names_must_exist(tmp_path: Path) -> None:
    folder = write_source_model(tmp_path / "model", n_shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = refused(folder)
    assert "model-00002-of-00002.safetensors: expected this file of weights" in message


def test_tensor_must_be_in_the_shard_that_the_index_names(tmp_path: Path) -> None:
    folder = write_source_model(tmp_path / "model", n_shards=2)
    edit_index(folder, "lm_head.weight", "model-00001-of-00002.safetensors")
    assert "expected tensor 'lm_head.weight', found no such tensor" in refused(folder)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "model.bin", 7, ""]
)
def test_index_may_not_point_elsewhere(file: object, tmp_path: Path) -> None:
    folder = write_source_model(tmp_path / "model", n_shards=2)
    edit_index(folder, "lm_head.weight", file)
    assert "expected the name of a safetensors file" in refused(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_index_of_another_form_is_refused(content: str, tmp_path: Path) -> None:
    folder = write_source_model(tmp_path / "model", n_shards=2)
    (folder / INDEX).write_text(content)
    assert INDEX in refused(folder)


def test_truncated_shard_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_source_model(tmp_path / "model", n_shards=2)
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = refused(folder)
    assert "model-00002-of-00002.safetensors" in message
    assert "truncated" in message


def test_file_cut_short_while_it_is_read_is_refused(tmp_path: Path) -> None:
    folder = write_source_model(tmp_path / "model")
    tensor = open_source(folder).tensors["lm_head.weight"]
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: tensor.offset + 10])
    with pytest.raises(ModelError, match=r"model\.safetensors: expected \d+ bytes"):
        tensor.read(0, tensor.n_elements)


def test_file_gone_while_it_is_read_is_refused(tmp_path: Path) -> None:
    folder = write_source_model(tmp_path / "model")
    tensor = open_source(folder).tensors["lm_head.weight"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: No such file"):
        tensor.read(0, tensor.n_elements)


class _Gate:
    """A file that can only be read while all others are."""

    def __init__(self, store: Any, barrier: Barrier) -> None:
        self._store, self._barrier = store, barrier
        self.name, self.n_bytes = store.name, store.n_bytes
        self._is_open = False

    def read(self, offset: int, n_bytes: int) -> Any:
        if not self._is_open:
            self._barrier.wait(timeout=PATIENCE_S)
            self._is_open = True
        return self._store.read(offset, n_bytes)


class _FarFiles:
    """The files of a folder, as if they lay far away."""

    n_reads_ahead = 2

    def __init__(self, folder: Path, n_files: int) -> None:
        self._files, self._barrier = LocalFiles(folder), Barrier(n_files)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def find(self, name: str) -> Any:
        found = self._files.find(name)
        is_weights = found is not None and name.endswith(".safetensors")
        return _Gate(found, self._barrier) if is_weights else found


def test_headers_of_files_far_away_are_read_at_the_same_time(tmp_path: Path) -> None:
    folder = write_source_model(tmp_path / "source", n_shards=3)
    expected = open_source(folder).tensors
    found = open_source(_FarFiles(folder, 3), needs_weights=True).tensors
    assert found.keys() == expected.keys()
    assert all(found[name].offset == tensor.offset for name, tensor in expected.items())
