"""What the README tells people to type works."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import PATIENCE_S

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NANORUN = Path(sys.executable).parent / "nanorun"


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=2 * PATIENCE_S)


def commands(start: str) -> list[str]:
    """Commands in the README's code spans and blocks that begin with `start`."""
    return re.findall(rf"(?:`|^    )({start} [^`\n]*?)(?:`|\s+#|$)", README, re.MULTILINE)


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A folder that make takes for a finished virtual environment: this one."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "nanorun"):
        (tmp_path / "bin" / name).symlink_to(Path(sys.executable).parent / name)
    for stamp in (".runtime", ".dev"):
        (tmp_path / stamp).touch()
    return tmp_path


def test_readme_names_only_targets_that_exist() -> None:
    targets = {command.split()[1] for command in commands("make")}
    assert {"chat", "test", "demo"} <= targets
    for target in targets:
        assert run("make", "--dry-run", target).returncode == 0, target


def test_make_demo_prints_a_right_answer_with_its_thinking_apart(venv: Path) -> None:
    done = run("make", "--silent", "demo", f"VENV={venv}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "5482"
    assert "5+7+0=12" in done.stderr


def test_readme_run_command_answers() -> None:
    (command,) = [c for c in commands("nanorun run") if '"' in c]
    assert command == 'nanorun run pico "What is 4785 + 697?"'
    done = run(NANORUN, "run", "pico", "What is 4785 + 697?", "--json")
    reply = json.loads(done.stdout)
    assert (done.returncode, reply["answer"].strip()) == (0, "5482")


def test_readme_convert_inspect_and_eval_commands_work(tmp_path: Path) -> None:
    recipe = re.search(r"nanorun convert SRC --recipe (\w+)", README)
    assert recipe is not None
    out = tmp_path / "pico.gguf"
    source = str(ROOT / "nanorun" / "data" / "pico")
    done = run(NANORUN, "convert", source, "--recipe", recipe[1], "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "MEM*EM*E" in run(NANORUN, "inspect", str(out)).stdout
    text = tmp_path / "text.txt"
    text.write_text("What is 12 + 30? " * 100)
    done = run(NANORUN, "eval", str(out), "--text", str(text), "--json")
    assert json.loads(done.stdout)["ppl"] > 1


def test_readme_mentions_every_command() -> None:
    listed = set(re.findall(r"^  (\w[\w-]*)  ", run(NANORUN, "--help").stdout, re.MULTILINE))
    mentioned = {command.split()[1] for command in commands("nanorun")}
    assert listed and listed <= mentioned, listed - mentioned


def test_readme_picture_exists() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).stat().st_size > 1000


def test_make_help_lists_the_targets() -> None:
    assert shutil.which("make")
    done = run("make")
    assert "chat" in done.stdout and "test" in done.stdout
