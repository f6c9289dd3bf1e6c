"""What a source model says about how it was quantized, beyond what its tensors show.

The encoding of each weight is plain from the tensors beside it. Here is what is not: transforms
that a runtime would have to undo, and NVFP4 whose activations must not be cut to 4 bits as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanorun.errors import ModelError
from nanorun_converters.source.foreign_quantization import (
    LABELS,
    foreign_method,
    refuse_foreign_method,
)
from nanorun_converters.source.source_model import SourceModel

CONFIG_FILE = "config.json"
MODELOPT_FILE = "hf_quant_config.json"
METHODS = ("modelopt", "modelopt_fp4", "modelopt_mixed", "compressed-tensors")
_ONLY_WEIGHTS = "W4A16_NVFP4"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of a source model were quantized."""

    method: str = ""
    """modelopt or compressed-tensors; "" for a source that is not quantized."""
    algorithm: str = ""
    """modelopt's name of what was done to all modules."""
    algorithm_of: Mapping[str, str] | None = None
    """The same by module, where modules differ."""

    def only_weights(self, module: str) -> bool:
        """Whether `module` was quantized for activations of full precision."""
        modules = self.algorithm_of or {}
        while module:
            if module in modules:
                return modules[module] == _ONLY_WEIGHTS
            module = module.rpartition(".")[0]
        return self.algorithm == _ONLY_WEIGHTS


def read_scheme(source: SourceModel, config: Mapping[str, Any]) -> Scheme:
    """The scheme that config.json, or modelopt's file beside it, states.

    Raises:
        ModelError: If it is one whose weights cannot be decoded by their tensors alone.
    """
    refuse_foreign_method(source, config)
    where = f"{source.origin / CONFIG_FILE}: quantization_config"
    stated = config.get("quantization_config")
    if stated is None:
        where = str(source.origin / MODELOPT_FILE)
        found = source.find_json(MODELOPT_FILE)
        stated = None if found is None else {"quant_method": "modelopt", **_inner(found)}
    if stated is None:
        return Scheme()
    if not isinstance(stated, dict):
        raise ModelError(f"{where}: expected an object, found {type(stated).__name__}")
    method = stated.get("quant_method", "modelopt")
    if method not in METHODS:
        label = LABELS.get(method) if isinstance(method, str) else None
        if label is not None:
            raise foreign_method(source, config, label, f"{where}: quant_method {method!r}")
        raise ModelError(
            f"{where}: quant_method: expected one of {', '.join(METHODS)}, found {method!r:.60}",
            facts=["NVIDIA publishes the same model as -BF16"],
        )
    _refuse_transforms(stated, where)
    layers = stated.get("quantized_layers")
    return Scheme(
        method=method,
        algorithm=_algorithm(stated),
        algorithm_of=_by_module(layers) if isinstance(layers, dict) else None,
    )


def _inner(found: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = found.get("quantization")
    return inner if isinstance(inner, dict) else {}


def _refuse_transforms(stated: Mapping[str, Any], where: str) -> None:
    for name in ("transform_config", "sparsity_config"):
        value = stated.get(name)
        is_dense = isinstance(value, dict) and value.get("format") == "dense"
        if value and not is_dense:
            raise ModelError(
                f"{where}: {name}: expected none, found {value!r:.80}",
                facts=["the weights would have to be transformed back first"],
            )


def _algorithm(stated: Mapping[str, Any]) -> str:
    groups = stated.get("config_groups")
    if stated.get("quant_method") == "compressed-tensors" and isinstance(groups, dict):
        # One group without activations means that only weights were quantized.
        entries = [group for group in groups.values() if isinstance(group, dict)]
        if entries and all(entry.get("input_activations") is None for entry in entries):
            return _ONLY_WEIGHTS
    algorithm = stated.get("quant_algo")
    return algorithm if isinstance(algorithm, str) else ""


def _by_module(layers: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: str(entry.get("quant_algo"))
        for name, entry in layers.items()
        if isinstance(entry, dict)
    }
