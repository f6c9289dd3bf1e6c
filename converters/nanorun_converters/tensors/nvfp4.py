"""NVFP4 that stays NVFP4: which tensors do, and the factors that must go with them.

ggml's NVFP4 has the scales of the blocks but not the factor of the whole matrix. The engine reads
that from a tensor of its own beside the weight, but not for every role, and beside a weight of an
MTP head it fails to load the file unless told to use the head. Where the factor would be lost or
do harm, the type is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from nanorun.errors import UsageError
from nanorun.model.arch import HybridArch
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import TensorSpec, optional_tensors
from nanorun_converters.source.encodings import Nvfp4Tensor
from nanorun_converters.source.source_model import SourceTensor, Store
from nanorun_converters.tensors.names import TensorPlan
from nanorun_quant.recipe import Assignment

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOVED = "nvfp4 as in the source, bit for bit"
_FACTOR = Assignment(GgmlType.F32, "factor of nvfp4 from the source")


@dataclass(frozen=True, slots=True)
class Factors:
    """One number of each part of a weight, as a vector."""

    tensors: tuple[SourceTensor, ...]
    is_divisor: bool

    @property
    def name(self) -> str:
        """As the source model has the first."""
        return self.tensors[0].name

    @property
    def store(self) -> Store:
        """Where the first lies."""
        return self.tensors[0].store

    @property
    def shape(self) -> tuple[int, ...]:
        """One entry a part."""
        return (len(self.tensors),)

    @property
    def n_elements(self) -> int:
        """Parts of the weight."""
        return len(self.tensors)

    @property
    def encoding(self) -> str:
        """For the table of types."""
        return "f32"

    def read(self, first: int, end: int) -> NDArray[np.float32]:
        """The factors of parts `first` to `end`."""
        values = np.concatenate([tensor.read(0, 1) for tensor in self.tensors[first:end]])
        with np.errstate(all="ignore"):
            return np.reciprocal(values) if self.is_divisor else values


def keeps_blocks(tensor: TensorPlan, type_: GgmlType) -> bool:
    """Whether a tensor's NVFP4 blocks are moved instead of made anew."""
    return type_ is GgmlType.NVFP4 and tensor.is_nvfp4


def add_factors(
    tensors: Sequence[TensorPlan],
    assignments: Mapping[str, Assignment],
    arch: HybridArch,
) -> tuple[list[TensorPlan], dict[str, Assignment]]:
    """Put behind each tensor that stays NVFP4 those that hold its factors.

    Raises:
        UsageError: If the engine reads no factor for such a tensor.
    """
    optional = optional_tensors(arch)
    planned: list[TensorPlan] = []
    assigned = dict(assignments)
    for tensor in tensors:
        planned.append(tensor)
        name = tensor.spec.name
        if not keeps_blocks(tensor, assigned[name].type):
            continue
        assigned[name] = replace(assigned[name], reason=MOVED)
        if name.startswith(f"blk.{arch.n_layer}."):
            raise _refusal(tensor, "of an MTP head", "nanorun convert SOURCE --no-mtp")
        for factors in _factors_of(tensor, optional):
            planned.append(factors)
            assigned[factors.spec.name] = _FACTOR
    return planned, assigned


def _factors_of(tensor: TensorPlan, optional: Mapping[str, TensorSpec]) -> list[TensorPlan]:
    parts = [part for part in tensor.parts if isinstance(part, Nvfp4Tensor)]
    stem = tensor.spec.name.removesuffix(".weight")
    spec = optional.get(f"{stem}.scale")
    if spec is None:
        role = tensor.spec.role.value
        command = f"nanorun convert SOURCE --recipe nvfp4 --type-map {role}=q8_0"
        raise _refusal(tensor, f"for {role} tensors", command)
    is_divisor = parts[0].is_divisor
    planned = [TensorPlan(spec, (Factors(tuple(p.factor for p in parts), is_divisor),))]
    inputs = tuple(part.input_scale for part in parts if part.input_scale is not None)
    if len(inputs) == len(parts):
        spec = optional[f"{stem}.input_scale"]
        planned.append(TensorPlan(spec, (Factors(inputs, is_divisor),)))
    return planned


def _refusal(tensor: TensorPlan, what: str, command: str) -> UsageError:
    return UsageError(
        f"{tensor.spec.name} cannot stay nvfp4: the engine reads no factor {what}",
        facts=[f"{tensor.parts[0].name} is nvfp4 in the source, with a factor for the matrix"],
        tries=[command],
    )
