"""Write a GGUF of a released model's full shape with made-up weights, in about a minute.

    python scripts/make_shape.py nano --recipe q4_0 --out nano-shape.gguf
    python scripts/make_shape.py super --recipe q4 --sparse --out super-shape.gguf

It loads, decodes and takes as much memory and time as the real model, and says nothing sensible.
With --sparse the weights are zeros that take no disk: every token then goes to the same experts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nanorun.errors import NanorunError
from nanorun.library import CATALOG
from nanorun.model.arch import HybridArch
from nanorun.model.ggml_type import GgmlType
from nanorun_converters.gguf_writer import Layout, TensorSlot, padded_bytes
from nanorun_converters.shape_file import lay_out_shape, write_shape
from nanorun_quant.fit import fit_recipe
from nanorun_quant.ggml import load_ggml
from nanorun_quant.recipe import recipe_by_name

# Rows that are quantized once and repeated; enough that experts differ from one another.
_N_ROWS = 1031
_SCALE = 0.02


def main() -> int:
    """Read the flags and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=[m.name for m in CATALOG.values() if m.arch])
    parser.add_argument("--recipe", default="q4_0", help="recipe or ggml type")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sparse", action="store_true", help="zeros that take no disk")
    args = parser.parse_args()
    try:
        arch, types = _types(args.model, args.recipe)
        if args.sparse:
            layout = write_shape(args.out, arch, types)
        else:
            layout = lay_out_shape(arch, types)
            _write(args.out, layout)
    except NanorunError as error:
        print(f"make_shape: error: {error.render()}", file=sys.stderr)
        return int(error.exit_code)
    print(f"{args.out}: {layout.file_bytes:,} bytes")
    return 0


def _types(model: str, recipe: str) -> tuple[HybridArch, dict[str, GgmlType]]:
    arch = CATALOG[model].arch
    assert arch is not None
    fit = fit_recipe(recipe_by_name(recipe), arch)
    return fit.arch, {name: given.type for name, given in fit.assignments.items()}


def _write(path: Path, layout: Layout) -> None:
    tiles: dict[tuple[GgmlType, int], NDArray[np.uint8]] = {}
    with path.open("wb") as stream:
        stream.write(layout.header)
        for slot in layout.slots:
            key = (slot.type, slot.shape[-1])
            if key not in tiles:
                tiles[key] = _tile(*key)
            for piece in _repeated(tiles[key], slot):
                stream.write(piece.data)
            stream.write(bytes(padded_bytes(slot.n_bytes) - slot.n_bytes))


def _tile(type_: GgmlType, n_per_row: int) -> NDArray[np.uint8]:
    numbers = np.random.default_rng(0).normal(0, _SCALE, (_N_ROWS, n_per_row)).astype(np.float32)
    if n_per_row == 1:
        numbers = -np.abs(numbers)  # ssm_a, whose states must decay
    imatrix = np.ones(n_per_row, np.float32)
    return load_ggml().quantize(numbers, type_, imatrix).reshape(-1)


def _repeated(tile: NDArray[np.uint8], slot: TensorSlot) -> list[NDArray[np.uint8]]:
    whole, rest = divmod(slot.n_bytes, tile.nbytes)
    return [*[tile] * whole, tile[:rest]]


if __name__ == "__main__":
    sys.exit(main())
