"""Weights that were quantized by methods that nanorun does not read, told by their tensors.

The field of config.json that names the method may be missing, as it is where weights were copied
by hand; without this check they would be called tensors of a wrong shape.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from nanorun.errors import ModelError
from nanorun_converters.source.source_model import SourceModel, SourceTensor

LABELS = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "mxfp4": "MXFP4",
    "mlx": "MLX",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "exl2": "ExLlamaV2",
    "auto-round": "AutoRound",
    "torchao": "torchao",
    "quark": "Quark",
}
"""What a method is called, by its name in config.json."""


def refuse_foreign_method(source: SourceModel, config: Mapping[str, Any]) -> None:
    """Refuse weights of another method.

    Raises:
        ModelError: Naming the method and a tensor of it.
    """
    for name, method in _signs(source.tensors):
        tensor = source.tensors[name]
        raise foreign_method(
            source, config, method, f"{source.origin / tensor.store.name}: tensor {tensor.name!r}"
        )


def foreign_method(
    source: SourceModel, config: Mapping[str, Any], method: str, where: str
) -> ModelError:
    """The error for a model whose weights `where` were quantized by `method`."""
    base = config.get("_name_or_path")
    is_other = isinstance(base, str) and base not in ("", source.files.argument)
    return ModelError(
        f"{where}: quantized by {method}, which nanorun does not read",
        facts=[
            "what can be converted is the model before that: of a fine-tune, the merged weights"
            " in BF16; NVIDIA publishes its own as -BF16"
        ],
        tries=[f"nanorun convert {shlex.quote(base)}"]
        if is_other and isinstance(base, str)
        else [],
    )


def _signs(tensors: Mapping[str, SourceTensor]) -> Iterator[tuple[str, str]]:
    """Tensors that only one method has, and the method."""
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        method = _method_of(tensors, module, leaf, tensor)
        if method is not None:
            yield name, method


# One question a method.
def _method_of(
    tensors: Mapping[str, SourceTensor], module: str, leaf: str, tensor: SourceTensor
) -> str | None:
    def beside(name: str) -> SourceTensor | None:
        return tensors.get(f"{module}.{name}")

    weight = beside("weight") or beside("weight_packed")
    is_bytes = weight is not None and weight.dtype == "U8"
    match leaf:
        case "absmax" | "quant_map" | "nested_absmax" | "SCB":
            return LABELS["bitsandbytes"]
        case _ if leaf.startswith("bitsandbytes__"):
            return LABELS["bitsandbytes"]
        case "qweight":
            return LABELS["gptq"] if beside("g_idx") or not beside("qzeros") else LABELS["awq"]
        case "q_weight" if beside("q_scale"):
            return LABELS["exl2"]
        case "W_q":
            return LABELS["hqq"]
        case "codebooks" if beside("codes"):
            return LABELS["aqlm"]
        case "scales" if weight is not None and weight.dtype == "U32":
            return LABELS["mlx"]
        case "weight_scale" if is_bytes and tensor.dtype in ("U8", "F8_E8M0"):
            return LABELS["mxfp4"]
        case "weight_packed" if tensor.dtype == "I32":
            return "compressed-tensors (packed integers)"
        case "weight" if tensor.dtype == "I8" and (beside("weight_scale") or beside("scale")):
            return "a method of 8-bit integers"
        case _ if leaf.endswith("_blocks") and beside(f"{leaf.removesuffix('_blocks')}_scales"):
            return LABELS["mxfp4"]
        case _:
            return None
