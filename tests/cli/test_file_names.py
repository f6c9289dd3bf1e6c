"""Files and folders whose names are bytes that no UTF-8 text has, through whole commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanorun.model.gguf import read_gguf

FOLDER, FILE = os.fsdecode(b"d\xe9p\xf4t"), os.fsdecode(b"caf\xe9 \xff.gguf")
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
GREEDY = ("--think", "off", "--temp", "0", "--max-tokens", "8")


def nanorun(*args: str | Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "nanorun", *args], stdin=subprocess.DEVNULL, capture_output=True,
        timeout=240, check=False, env={**os.environ, **environment}, cwd=Path(__file__).parents[2],
    )  # fmt: skip


@pytest.fixture
def model(pico_gguf: Path, tmp_path: Path) -> Path:
    """Pico under such a name."""
    folder = tmp_path / FOLDER
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes no such names")
    shutil.copyfile(pico_gguf, folder / FILE)
    return folder / FILE


@pytest.mark.parametrize("environment", [{}, C_LOCALE], ids=["utf-8", "C"])
def test_run_finds_the_file(model: Path, environment: dict[str, str]) -> None:
    done = nanorun("run", model, "12 + 30", *GREEDY, **environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.strip()


def test_inspect_gives_a_path_that_finds_the_file_again(model: Path) -> None:
    done = nanorun("inspect", model, "--json")
    assert (done.returncode, done.stderr) == (0, b"")
    assert Path(json.loads(done.stdout.decode())["path"]) == model


def test_plan_asks_the_engine_about_the_file(model: Path) -> None:
    done = nanorun("plan", model, "--n-ctx", "2048", "--probe")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.fixture
def text(model: Path) -> Path:
    """A text to measure on, under such a name."""
    path = model.with_name(os.fsdecode(b"t\xe9xt"))
    path.write_text("12 + 30 = 42. " * 200)
    return path


def test_imatrix_names_the_text_in_its_file(model: Path, text: Path) -> None:
    out = model.with_name(os.fsdecode(b"imatrix \xff.gguf"))
    done = nanorun("imatrix", model, "--text", text, "--out", out, "--n-ctx", "256")
    assert done.returncode == 0, done.stderr
    keys = read_gguf(out).metadata
    assert keys["imatrix.datasets"] == ["t\N{REPLACEMENT CHARACTER}xt"]


def test_folder_is_converted_to_such_a_file(pico_source: Path, model: Path) -> None:
    folder, out = model.parent / FOLDER, model.with_name(os.fsdecode(b"\xff.gguf"))
    shutil.copytree(pico_source, folder)
    done = nanorun("convert", folder, "--recipe", "q8_0", "--out", out)
    assert done.returncode == 0, done.stderr
    name = read_gguf(out).metadata["general.name"]
    assert name == "d\N{REPLACEMENT CHARACTER}p\N{REPLACEMENT CHARACTER}t"


def test_eval_takes_such_files(model: Path, text: Path) -> None:
    done = nanorun("eval", model, "--text", text, "--n-ctx", "256")
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr


def test_cache_folder_may_have_any_name(tmp_path: Path) -> None:
    cache = tmp_path / FOLDER
    done = nanorun("run", "pico", "12 + 30", *GREEDY, NANORUN_CACHE_DIR=str(cache))
    assert (done.returncode, done.stderr) == (0, b"")
    assert list((cache / "models").iterdir())


def test_error_about_the_file_is_one(model: Path) -> None:
    with model.open("r+b") as file:
        file.truncate(1000)
    done = nanorun("run", model, "x")
    assert done.returncode == 3
    assert done.stderr.startswith(b"nanorun: error: ")
    assert "caf\N{REPLACEMENT CHARACTER}" in done.stderr.decode()
