"""What `make chat` says while llama.cpp is compiled: pip's words, but for what lasts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

FILTER = Path(__file__).parents[1] / "scripts" / "compiling.awk"
FETCHED = """Collecting numpy>=1.26 (from nanorun==0.1.0)
  Using cached numpy-2.4.6-cp311-cp311-manylinux_2_28_x86_64.whl
Building wheels for collected packages: nanorun
  Building editable for nanorun (pyproject.toml): started
  Building editable for nanorun (pyproject.toml): finished with status 'done'
Successfully installed nanorun-0.1.0 numpy-2.4.6
"""
COMPILED = """Building wheels for collected packages: {name}, nanorun
  Building wheel for {name} (pyproject.toml): started
  Building wheel for {name} (pyproject.toml): still running...
  Building wheel for {name} (pyproject.toml): still running...
  Building wheel for {name} (pyproject.toml): finished with status 'done'
"""

pytestmark = pytest.mark.skipif(shutil.which("awk") is None, reason="there is no awk")


def shown(pip_says: str) -> list[str]:
    command = ["awk", "-f", str(FILTER)]
    done = subprocess.run(command, input=pip_says, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["llama-cpp-python", "llama_cpp_python"])
def test_compiling_is_said_and_goes_on(name: str) -> None:
    first, *rest = shown(COMPILED.format(name=name))
    assert first.startswith("compiling llama.cpp for this machine, once: about ")
    assert rest == ["  still compiling (1 min)", "  still compiling (2 min)", "compiled"]


def test_nothing_is_said_where_a_wheel_is_there() -> None:
    assert shown(FETCHED) == []
