"""llama.cpp's own converter and quantizer, run as the peers they are.

The converter is a script in llama-cpp-python's source distribution, not in its wheel: the
environment variable NANORUN_LLAMA_CPP names the `vendor/llama.cpp` of an unpacked one.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

VARIABLE = "NANORUN_LLAMA_CPP"

# It recognises a tokenizer by a hash of what it makes of a text, and none of a made-up one.
_RUN = """
import runpy, sys
root = sys.argv[1]
sys.path[:0] = [root, root + "/gguf-py"]
from conversion import base
for name in dir(base):
    kind = getattr(base, name)
    if hasattr(kind, "get_vocab_base_pre"):
        kind.get_vocab_base_pre = lambda self, tokenizer: "tekken"
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def llama_cpp_folder() -> Path | None:
    """Where llama.cpp's converter is, if it is anywhere."""
    named = os.environ.get(VARIABLE)
    folder = Path(named) if named else None
    return folder if folder and (folder / "convert_hf_to_gguf.py").is_file() else None


def converter_command(
    root: Path, source: Path, out: Path, outtype: str, options: Sequence[str] = ()
) -> list[str]:
    """The command that converts `source`."""
    args = [str(root), str(source), "--outfile", str(out), "--outtype", outtype, *options]
    return [sys.executable, "-c", _RUN, *args]


def convert_with_llama(
    root: Path, source: Path, out: Path, outtype: str, options: Sequence[str] = ()
) -> Path:
    """Run the converter; its output is in the error if it fails."""
    command = converter_command(root, source, out, outtype, options)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise AssertionError(f"convert_hf_to_gguf.py failed:\n{done.stderr[-3000:]}")
    return out


def quantize_with_llama(source: Path, out: Path, file_type: int, n_threads: int = 2) -> Path:
    """Quantize a GGUF to one type throughout, by `llama_model_quantize`."""
    from nanorun.runtime.llama.binding import load_llama

    llama = load_llama()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.pure, params.nthread = file_type, True, n_threads
    status = llama.llama_model_quantize(
        str(source).encode(), str(out).encode(), ctypes.byref(params)
    )
    assert status == 0
    return out
