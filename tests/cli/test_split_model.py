"""A model in several files through the commands that open one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Result

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, pico_source: Path) -> list[Path]:
    """Pico in BF16, split in several files."""
    from nanorun_converters.convert import ConvertOptions, convert

    folder = tmp_path_factory.mktemp("split")
    out = folder / "pico.gguf"
    convert(pico_source, ConvertOptions(out=out, recipe="bf16", split_max_bytes=4 * 2**20))
    return sorted(folder.glob("pico-*.gguf"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pico_source: Path) -> Path:
    from nanorun_converters.convert import ConvertOptions, convert

    out = tmp_path_factory.mktemp("whole") / "pico.gguf"
    convert(pico_source, ConvertOptions(out=out, recipe="bf16"))
    return out


def test_run_answers_from_the_first_file(nanorun: Run, files: list[Path], whole: Path) -> None:
    assert len(files) > 2
    flags = ["What is 12 + 34?", "--temp", "0", "--max-tokens", "12", "--think", "off"]
    answers = [nanorun("run", str(path), *flags) for path in (files[0], whole)]
    assert answers[0].code == 0, answers[0].err
    assert answers[0].out == answers[1].out


def test_inspect_counts_all_files(nanorun: Run, files: list[Path], whole: Path) -> None:
    split, one = (
        json.loads(nanorun("inspect", str(path), "--json").out) for path in (files[0], whole)
    )
    assert (split["n_files"], one["n_files"]) == (len(files), 1)
    assert split["bytes"] == sum(path.stat().st_size for path in files)
    assert split["tensors"] == one["tensors"]
    assert f"(and {len(files) - 1} more)" in nanorun("inspect", str(files[0])).out


def test_plan_counts_all_files(nanorun: Run, files: list[Path], whole: Path) -> None:
    plans = []
    for path in (files[0], whole):
        result = nanorun("plan", str(path), "--n-ctx", "1k", "--device", "cpu", "--json")
        assert result.code == 0, result.err
        plans.append(json.loads(result.out)["devices"][0]["weights_bytes"])
    assert plans[0] == plans[1]


def test_convert_takes_the_first_file(
    nanorun: Run, files: list[Path], whole: Path, tmp_path: Path
) -> None:
    made = []
    for path in (files[0], whole):
        out = tmp_path / f"{len(made)}.gguf"
        result = nanorun("convert", str(path), "--recipe", "q4_0", "--out", str(out))
        assert result.code == 0, result.err
        shown = json.loads(nanorun("inspect", str(out), "--json").out)
        made.append((shown["tensors"], out.read_bytes()[-100_000:]))
    assert made[0] == made[1]


def test_eval_compares_a_split_file_with_the_whole(
    nanorun: Run, files: list[Path], whole: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What is 47 + 86? " * 30)
    result = nanorun(
        "eval", str(files[0]), "--text", str(text), "--against", str(whole), "--n-ctx", "64",
        "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert json.loads(result.out)["kld_mean"] < 1e-5


@pytest.mark.parametrize("command", ["run", "inspect", "plan", "convert"])
def test_later_file_is_refused_with_the_first_one_named(
    command: str, nanorun: Run, files: list[Path]
) -> None:
    arguments = ["hello"] if command == "run" else []
    result = nanorun(command, str(files[1]), *arguments)
    assert result.code == 3
    assert f"is file 2 of the {len(files)} that a model is split into" in result.err
    assert str(files[0]) in result.err


def test_missing_file_is_named(nanorun: Run, files: list[Path]) -> None:
    hidden = files[-1].rename(files[-1].with_suffix(".away"))
    try:
        result = nanorun("inspect", str(files[0]))
    finally:
        hidden.rename(files[-1])
    assert result.code == 3
    assert f"{files[-1]}: no such file" in result.err


def test_files_in_upper_case_are_opened(
    nanorun: Run, files: list[Path], whole: Path, tmp_path: Path
) -> None:
    for path in files:
        (tmp_path / path.name).with_suffix(".GGUF").hardlink_to(path)
    first = min(tmp_path.iterdir())
    flags = ["What is 12 + 34?", "--temp", "0", "--max-tokens", "4", "--think", "off"]
    answers = [nanorun("run", str(path), *flags) for path in (first, whole)]
    assert answers[0].code == 0, answers[0].err
    assert answers[0].out == answers[1].out
