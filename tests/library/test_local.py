from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

import nanorun_converters.convert
from nanorun.errors import ModelError, NanorunError, UsageError
from nanorun.library.bundled import BUNDLED_MODELS, BundledFiles
from nanorun.library.local import models_folder, resolve_model
from nanorun_converters.options import ConvertOptions
from tests.support.waiting import PATIENCE_S


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANORUN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for the bundled source model: only its bytes matter here."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("about it")
    monkeypatch.setitem(BUNDLED_MODELS, "pico", BundledFiles("pico", (folder,)))
    return folder


class Converter:
    """Takes the converter's place; counts calls and writes what the source holds."""

    def __init__(self) -> None:
        self.calls: list[ConvertOptions] = []
        self.error: BaseException | None = None
        self.barrier: Barrier | None = None

    def __call__(self, source: BundledFiles, options: ConvertOptions, progress: Any = None) -> None:
        self.calls.append(options)
        assert options.out is not None
        options.out.write_text("half")
        if self.barrier is not None:
            self.barrier.wait(timeout=PATIENCE_S)
        if self.error is not None:
            raise self.error
        if progress is not None:
            progress("done")
        options.out.write_text((source.where / "config.json").read_text())


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> Converter:
    converter = Converter()
    monkeypatch.setattr(nanorun_converters.convert, "convert", converter)
    return converter


def test_pico_is_converted_once(cache: Path, source: Path, converter: Converter) -> None:
    steps: list[Any] = []
    path = resolve_model("pico", progress=steps.append)
    assert path.parent == cache
    assert path.read_text() == "{}"
    assert steps == ["done"]
    assert converter.calls[0].recipe == "q8_0"
    assert resolve_model("pico") == path
    assert len(converter.calls) == 1
    assert list(cache.iterdir()) == [path]


def test_new_pico_is_converted_anew(cache: Path, source: Path, converter: Converter) -> None:
    first = resolve_model("pico")
    (source / "README.md").write_text("other words change nothing")
    assert resolve_model("pico") == first
    (source / "config.json").write_text('{"other": 1}')
    second = resolve_model("pico")
    assert second != first
    assert second.read_text() == '{"other": 1}'


@pytest.mark.parametrize("error", [ModelError("damaged"), KeyboardInterrupt()])
def test_failed_conversion_leaves_nothing(
    error: BaseException, cache: Path, source: Path, converter: Converter
) -> None:
    converter.error = error
    with pytest.raises(type(error)):
        resolve_model("pico")
    assert list(cache.iterdir()) == []


def test_two_first_uses_at_once_both_get_a_whole_file(
    cache: Path, source: Path, converter: Converter
) -> None:
    converter.barrier = Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(resolve_model, ["pico", "pico"]))
    assert len(converter.calls) == 2
    assert paths[0] == paths[1]
    assert paths[0].read_text() == "{}"
    assert list(cache.iterdir()) == [paths[0]]


def test_unwritable_cache_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path, converter: Converter
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANORUN_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(NanorunError, match="cannot be written") as caught:
        resolve_model("pico")
    assert "NANORUN_CACHE_DIR=" in caught.value.render()


def test_cache_folder_is_the_platforms_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANORUN_CACHE_DIR", "~/elsewhere")
    assert models_folder() == Path.home() / "elsewhere" / "models"
    monkeypatch.delenv("NANORUN_CACHE_DIR")
    assert models_folder().parts[-2:] != ("elsewhere", "models")
    assert "nanorun" in models_folder().parts


def test_existing_file_is_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"")
    assert resolve_model(str(path)) == path


def test_name_of_the_library_wins_over_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, source: Path, converter: Converter
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pico").write_text("mine")
    assert resolve_model("pico").parent == cache
    assert resolve_model("./pico").read_text() == "mine"


def test_missing_gguf_offers_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "model-q8_0.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model-q8\.gguf: no such file") as caught:
        resolve_model(str(tmp_path / "model-q8.gguf"))
    assert "nearest: model-q8_0.gguf" in caught.value.render()


def test_source_folder_says_how_to_convert_it(tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="is a source model") as caught:
        resolve_model(str(folder))
    assert caught.value.tries == (f"nanorun convert '{folder}' --out 'my model.gguf'",)


def test_other_folder_offers_the_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"expected config\.json") as caught:
        resolve_model(str(tmp_path))
    assert caught.value.tries == (f"nanorun chat {tmp_path / 'a.gguf'}",)


@pytest.mark.parametrize("name", ["nano", "nano:16g", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"])
def test_model_that_is_not_here_says_how_to_get_it(name: str) -> None:
    with pytest.raises(ModelError, match="nano is not on this machine") as caught:
        resolve_model(name)
    assert caught.value.tries[1:] == (
        "nanorun convert nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 --recipe q4 --out nano.gguf",
        "nanorun chat nano.gguf",
    )


@pytest.mark.parametrize(
    "name", ["pic", "pico:8g", "", "x" * 5000, "a\0b", "~nobody-of-that-name/model", "no/such"]
)
def test_what_is_nothing_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="there is no model"):
        resolve_model(name)


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        resolve_model("pica")
    assert "nearest: pico" in caught.value.render()


def test_person_without_a_home_is_told_to_name_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "NANORUN_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(NanorunError, match="there is no home folder to keep models in") as caught:
        models_folder()
    assert caught.value.tries == ("export NANORUN_CACHE_DIR=FOLDER",)
    monkeypatch.setenv("NANORUN_CACHE_DIR", "~/elsewhere")
    with pytest.raises(NanorunError, match="there is no home folder"):
        models_folder()


def test_leftover_of_macos_is_no_neighbour(tmp_path: Path) -> None:
    (tmp_path / "._pico.gguf").write_bytes(b"")
    (tmp_path / "pico.GGUF").write_bytes(b"")
    with pytest.raises(ModelError) as caught:
        resolve_model(str(tmp_path / "pic.gguf"))
    assert caught.value.facts == ("nearest: pico.GGUF",)
    with pytest.raises(ModelError) as caught:
        resolve_model(str(tmp_path))
    assert [command.rpartition("/")[2] for command in caught.value.tries] == ["pico.GGUF"]


def test_folder_of_an_adapter_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="an adapter"):
        resolve_model(str(tmp_path))
