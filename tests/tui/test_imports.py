from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["llama_cpp", "torch", "numpy", "fastapi", "transformers"])
def test_chat_paints_before_anything_heavy_is_imported(package: str) -> None:
    code = f"import nanorun.tui.app, sys; sys.exit({package!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
