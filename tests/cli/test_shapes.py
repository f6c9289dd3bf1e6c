"""MODEL as `plan` takes it: names, files and folders here, addresses and repositories elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanorun.cli.app import invoke
from nanorun.cli.shapes import shapes_of_model
from nanorun.errors import ModelError, NanorunError, UsageError
from nanorun.model.ggml_type import GgmlType
from tests.model.known_archs import TINY_MOE
from tests.plan.profiles import FOLDER
from tests.support.builders import arch_tensors, gguf_metadata, write_gguf
from tests.support.hub_server import REPOSITORY, FakeHub, serve_hub
from tests.support.waiting import little_work


@pytest.fixture
def repository(tmp_path: Path, pico_source: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    shutil.copy(pico_source / "config.json", folder)
    write_gguf(folder / "tiny.gguf", gguf_metadata(TINY_MOE), arch_tensors(TINY_MOE, GgmlType.Q8_0))
    return folder


@pytest.fixture
def hub(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serve_hub(repository) as served:
        served.lfs = (".gguf",)
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        yield served


def test_header_elsewhere_is_planned_like_the_file(hub: FakeHub, repository: Path) -> None:
    (here,) = shapes_of_model(str(repository / "tiny.gguf"))
    (there,) = shapes_of_model(f"{REPOSITORY}/tiny.gguf")
    assert there.tensors == here.tensors
    assert there.arch == here.arch
    assert there.path is None
    assert hub.n_bytes_sent < (repository / "tiny.gguf").stat().st_size + 10_000


@pytest.mark.parametrize("form", [REPOSITORY, f"hf://{REPOSITORY}", f"{REPOSITORY}@v1.0"])
def test_repository_is_planned_from_its_config(hub: FakeHub, pico_source: Path, form: str) -> None:
    (here,) = shapes_of_model(str(pico_source), "q8_0")
    (there,) = shapes_of_model(form, "q8_0")
    assert (there.tensors, there.arch) == (here.tensors, here.arch)
    assert there.repository == REPOSITORY
    assert len(shapes_of_model(form)) > 3


def test_repository_without_a_config_names_its_files(hub: FakeHub, repository: Path) -> None:
    (repository / "config.json").unlink()
    with pytest.raises(ModelError, match="expected a source model's config") as caught:
        shapes_of_model(REPOSITORY)
    assert caught.value.tries == (f"nanorun plan {REPOSITORY}/tiny.gguf",)


@pytest.mark.parametrize("text", ["[]", "{", "\xff", '{"model_type": "llama"}'])
def test_config_that_is_none_is_refused(hub: FakeHub, repository: Path, text: str) -> None:
    (repository / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=f"{REPOSITORY}/config"):
        shapes_of_model(REPOSITORY)


def test_config_of_any_size_is_not_read(hub: FakeHub, repository: Path) -> None:
    (repository / "config.json").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(ModelError, match="more than a config"):
        shapes_of_model(REPOSITORY)


def test_known_repository_is_planned_without_asking_the_hub() -> None:
    by_name = shapes_of_model("nano:q4")
    by_repository = shapes_of_model("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "q4")
    assert by_repository[0].tensors == by_name[0].tensors


def test_model_of_unknown_shape_needs_the_hub() -> None:
    with pytest.raises(NanorunError, match="cannot be read from") as caught:
        shapes_of_model("ultra")
    assert "HF_HUB_OFFLINE" in caught.value.facts[0]


def test_recipe_of_a_file_elsewhere_is_refused(hub: FakeHub) -> None:
    with pytest.raises(UsageError, match="is for models that are still to be converted"):
        shapes_of_model(f"{REPOSITORY}/tiny.gguf", "q4")
    assert not hub.requests


def test_folder_of_that_name_wins(
    hub: FakeHub, pico_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / REPOSITORY
    folder.mkdir(parents=True)
    shutil.copy(pico_source / "config.json", folder)
    assert shapes_of_model(REPOSITORY, "q8_0")[0].repository is None
    assert not hub.requests


def test_plan_of_a_remote_header_takes_little_time(
    hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = str(FOLDER / "rtx-4090.json")
    with little_work(cpu_s=10):
        code = invoke(["plan", f"{REPOSITORY}/tiny.gguf", "--n-ctx", "4k", "--hardware", machine])
    assert code == 0
    assert capsys.readouterr().out.startswith(f"{REPOSITORY}/tiny.gguf on ")
