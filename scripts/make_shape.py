"""Write a GGUF of a released model's full shape with made-up weights, in about a minute.

    python scripts/make_shape.py nano --recipe q4_0 --out nano-shape.gguf
    python scripts/make_shape.py super --recipe q4 --sparse --out super-shape.gguf

It loads, decodes and takes as much memory and time as the real model, and says nothing sensible.
With --sparse the weights are zeros that take no disk: every token then goes to the same experts.
Its tokenizer is pico's, filled up with made-up words to the model's vocabulary.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from itertools import count, islice, product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nanorun.errors import NanorunError
from nanorun.library import BUNDLED_MODELS, CATALOG
from nanorun.model.arch import HybridArch
from nanorun.model.ggml_type import GgmlType
from nanorun_converters.family.tokenizer import TokenType, Vocabulary, read_vocabulary
from nanorun_converters.opened.shape_file import lay_out_shape, write_shape
from nanorun_converters.output.gguf_header import Layout, TensorSlot, padded_bytes
from nanorun_converters.source.open import open_source
from nanorun_quant.fit import fit_recipe
from nanorun_quant.ggml import load_ggml
from nanorun_quant.recipe_names import recipe_by_name

# Rows that are quantized once and repeated; enough that experts differ from one another.
_N_ROWS = 1031
_SCALE = 0.02


def main() -> int:
    """Read the flags and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=[m.name for m in CATALOG.values() if m.arch])
    parser.add_argument("--recipe", default="q4_0", help="recipe or ggml type")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="only the first N layers, and the MTP head")
    parser.add_argument("--sparse", action="store_true", help="zeros that take no disk")
    args = parser.parse_args()
    try:
        arch, types = _types(args.model, args.recipe, args.layers)
        vocabulary = _vocabulary(arch.n_vocab)
        if args.sparse:
            layout = write_shape(args.out, arch, types, vocabulary)
        else:
            layout = lay_out_shape(arch, types, vocabulary)
            _write(args.out, layout)
    except NanorunError as error:
        print(f"make_shape: error: {error.render()}", file=sys.stderr)
        return int(error.exit_code)
    print(f"{args.out}: {layout.file_bytes:,} bytes")
    return 0


def _types(model: str, recipe: str, n_layers: int | None) -> tuple[HybridArch, dict[str, GgmlType]]:
    arch = CATALOG[model].arch
    assert arch is not None
    if n_layers is not None:
        arch = replace(arch, layers=arch.layers[:n_layers])

    def again(recipe: str, **_: object) -> str:
        return f"python scripts/make_shape.py {model} --recipe {recipe} --out OUT.gguf"

    fit = fit_recipe(recipe_by_name(recipe), arch, again=again)
    return fit.arch, {name: given.type for name, given in fit.assignments.items()}


def _vocabulary(n_vocab: int) -> Vocabulary:
    """The vocabulary of pico, and words of three syllables or more that nothing is split into."""
    source = open_source(BUNDLED_MODELS["pico"].where)
    config = source.read_json("config.json")
    vocabulary = read_vocabulary(source, config, config["vocab_size"])
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    invented = ("".join(word) for n in count(3) for word in product(syllables, repeat=n))
    words = islice(invented, n_vocab - len(vocabulary.tokens))
    tokens = (*vocabulary.tokens, *("\u0120" + word for word in words))
    types = (*vocabulary.types, *[TokenType.NORMAL] * (n_vocab - len(vocabulary.types)))
    return replace(vocabulary, tokens=tokens, types=types)


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
