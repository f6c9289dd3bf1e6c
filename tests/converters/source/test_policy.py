"""Folders that hold something else than a source model, and what of a folder counts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nanorun.errors import ModelError
from nanorun_converters.source.files import LocalFiles, counts
from nanorun_converters.source.open import INDEX_FILE, open_source
from tests.support.source_models import write_json, write_source_model

WHOLE = "model.safetensors"


def test_folder_of_an_adapter_is_called_one(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"an adapter \(LoRA\), not a model") as caught:
        open_source(tmp_path)
    assert "AutoPeftModelForCausalLM" in caught.value.tries[0]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_weights_in_pytorchs_own_format_are_called_so(name: str, tmp_path: Path) -> None:
    folder = write_source_model(tmp_path)
    (folder / WHOLE).rename(folder / name)
    with pytest.raises(ModelError, match="weights in PyTorch's own format") as caught:
        open_source(folder)
    assert "save_pretrained" in caught.value.tries[0]
    assert caught.value.tries[1] == f"nanorun convert {folder}-safetensors"


def test_old_weights_beside_safetensors_are_no_fault(tmp_path: Path) -> None:
    folder = write_source_model(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert open_source(folder).tensors


@pytest.mark.parametrize(
    ("name", "does"),
    [
        ("model.safetensors", True),
        ("._model.safetensors", False),
        ("additional_chat_templates/rag.jinja", True),
        ("additional_chat_templates/._rag.jinja", False),
        ("original/consolidated.00.safetensors", False),
    ],
)
def test_what_counts(name: str, does: bool, tmp_path: Path) -> None:
    assert counts(name) is does
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert (name in LocalFiles(tmp_path).names()) is does


def both(folder: Path) -> Path:
    """A folder of shards with an index, and a whole file of another model beside them."""
    write_source_model(folder, n_shards=2, seed=1)
    (folder / INDEX_FILE).rename(folder / "index")
    write_source_model(folder, seed=2)
    (folder / "index").rename(folder / INDEX_FILE)
    return folder


def touched(folder: Path, *, newer: str) -> Path:
    for path in folder.glob("*.safetensors"):
        is_newer = (path.name == WHOLE) is (newer == WHOLE)
        os.utime(path, ns=(0, 2_000_000_000 if is_newer else 1_000_000_000))
    return folder


@pytest.mark.parametrize(("newer", "older"), [(WHOLE, INDEX_FILE), (INDEX_FILE, WHOLE)])
def test_of_two_sets_of_weights_the_newer_is_taken_and_said(
    newer: str, older: str, tmp_path: Path
) -> None:
    source = open_source(touched(both(tmp_path), newer=newer))
    assert ({store.name for store in source.stores} == {WHOLE}) is (newer == WHOLE)
    assert any(
        note == f"{tmp_path / older}: passed over: {newer} is another set of weights, newer"
        for note in source.notes
    )


def test_index_of_shards_that_are_gone_is_passed_over(tmp_path: Path) -> None:
    folder = both(tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    source = open_source(folder)
    assert [store.name for store in source.stores] == [WHOLE]
    assert "it names model-00002-of-00002.safetensors, which is not there" in source.notes[0]
    assert "model-00001-of-00002.safetensors: passed over" in source.notes[1]


def test_two_sets_of_one_age_that_disagree_are_named(tmp_path: Path) -> None:
    write_source_model(tmp_path, n_shards=2)
    (tmp_path / INDEX_FILE).rename(tmp_path / "index")
    write_source_model(tmp_path, hidden_size=64)
    (tmp_path / "index").rename(tmp_path / INDEX_FILE)
    for path in tmp_path.glob("*.safetensors"):
        os.utime(path, ns=(0, 1_000_000_000))
    with pytest.raises(ModelError, match="two sets of weights that disagree"):
        open_source(tmp_path)


def test_shard_that_the_index_does_not_name_is_said(tmp_path: Path) -> None:
    folder = write_source_model(tmp_path, n_shards=2)
    (folder / "extra.safetensors").write_bytes(b"")
    assert open_source(folder).notes == [
        f"{folder / 'extra.safetensors'}: passed over, no tensor is taken from it"
    ]


def test_folder_in_order_has_no_notes(tmp_path: Path) -> None:
    assert open_source(write_source_model(tmp_path / "a", n_shards=3)).notes == []
    assert open_source(write_source_model(tmp_path / "b")).notes == []


def test_dates_in_the_cache_of_the_hub_are_those_of_downloads(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    both(touched(both(snapshot), newer=WHOLE))
    assert LocalFiles(snapshot).modified(WHOLE) is None
    source = open_source(snapshot)
    assert WHOLE not in {store.name for store in source.stores}
    assert f"{snapshot / WHOLE}: passed over: {INDEX_FILE} names as many tensors" in source.notes


def test_whole_file_that_is_cut_short_is_passed_over_and_said(tmp_path: Path) -> None:
    folder = touched(both(tmp_path), newer=WHOLE)
    (folder / WHOLE).write_bytes((folder / WHOLE).read_bytes()[:-4])
    source = open_source(folder)
    assert WHOLE not in {store.name for store in source.stores}
    assert "it is truncated" in source.notes[0]
