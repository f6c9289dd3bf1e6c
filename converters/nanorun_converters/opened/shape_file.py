"""A GGUF of a model's shape without its weights, for planning, probing and benchmarks.

The header is that of a real file, but for a vocabulary, which it need not have. The data is a hole
in the file, which takes no disk and reads as zeros, unless something is written there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nanorun.errors import NanorunError
from nanorun.model.arch import HybridArch
from nanorun.model.footprint import tensor_bytes
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import expected_tensors
from nanorun_converters.family.metadata import shape_keys, tokenizer_keys
from nanorun_converters.family.tokenizer import Vocabulary
from nanorun_converters.output.gguf_header import Layout, TensorSlot, lay_out, string

_NO_VOCABULARY = {"tokenizer.ggml.model": string("no_vocab")}


def lay_out_shape(
    arch: HybridArch, types: Mapping[str, GgmlType], vocabulary: Vocabulary | None = None
) -> Layout:
    """The header and the places of all tensors of `arch`, in the types given by name.

    Args:
        arch: The shape.
        types: Type of each tensor.
        vocabulary: A tokenizer for it; without one the file cannot take text.

    Raises:
        ValueError: If a type's block does not divide a row.
    """
    metadata = {
        "general.architecture": string(arch.name),
        "general.name": string(f"{arch.name} shape"),
        **{f"{arch.name}.{key}": value for key, value in shape_keys(arch).items()},
        **(tokenizer_keys(vocabulary) if vocabulary else _NO_VOCABULARY),
    }
    slots = [
        TensorSlot(spec.name, types[spec.name], spec.shape, tensor_bytes(spec, types[spec.name]))
        for spec in expected_tensors(arch).values()
    ]
    return lay_out(metadata, slots)


def write_shape(
    path: Path,
    arch: HybridArch,
    types: Mapping[str, GgmlType],
    vocabulary: Vocabulary | None = None,
) -> Layout:
    """Write a file of the full size whose data is a hole.

    Raises:
        NanorunError: If it cannot be written.
    """
    layout = lay_out_shape(arch, types, vocabulary)
    try:
        with path.open("wb") as stream:
            stream.write(layout.header)
            stream.truncate(layout.file_bytes)
    except OSError as error:
        raise NanorunError(f"{path} cannot be written: {error.strerror or error}") from error
    return layout
