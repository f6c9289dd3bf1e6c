"""NVFP4 that stays NVFP4: which tensors do, and the factors that must go with them.

ggml's NVFP4 has the scales of the blocks but not the factor of the whole matrix. The engine reads
that from a tensor of its own beside the weight, but not for every role, and beside a weight of an
MTP head it fails to load the file unless told to use the head. Where the factor would be lost or
do harm, the type is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from nanorun.errors import UsageError
from nanorun.model.arch import HybridArch
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import TensorSpec, optional_tensors
from nanorun_converters.source.encodings import Nvfp4Factors, Nvfp4Tensor
from nanorun_converters.tensors.tensor_plan import OutputTensor, TensorPlan
from nanorun_quant.recipe import Again, Assignment

_FACTOR = Assignment(GgmlType.F32, "factor of nvfp4 from the source")


def with_factors(
    tensors: Sequence[OutputTensor], arch: HybridArch, *, again: Again
) -> Iterator[OutputTensor]:
    """Each tensor, and behind one that keeps its NVFP4 blocks those that hold its factors.

    Raises:
        UsageError: If the engine reads no factor for such a tensor; it suggests what `again` makes
            of the options that give it another type.
    """
    optional = optional_tensors(arch)
    for tensor in tensors:
        yield tensor
        if not tensor.keeps_blocks:
            continue
        if tensor.spec.name.startswith(f"blk.{arch.n_layer}."):
            raise _refusal(tensor, "of an MTP head", again(keep_mtp=False))
        for factors in _factors_of(tensor, optional, again):
            yield factors.written_as(_FACTOR)


def _factors_of(
    tensor: OutputTensor, optional: Mapping[str, TensorSpec], again: Again
) -> Iterator[TensorPlan]:
    parts = [part for part in tensor.parts if isinstance(part, Nvfp4Tensor)]
    stem = tensor.spec.name.removesuffix(".weight")
    spec = optional.get(f"{stem}.scale")
    if spec is None:
        role = tensor.spec.role.value
        command = again(recipe=GgmlType.NVFP4.label, type_map={role: GgmlType.Q8_0.label})
        raise _refusal(tensor, f"for {role} tensors", command)
    is_divisor = parts[0].is_divisor
    yield TensorPlan(spec, (Nvfp4Factors(tuple(p.factor for p in parts), is_divisor),))
    inputs = tuple(part.input_scale for part in parts if part.input_scale is not None)
    if len(inputs) == len(parts):
        yield TensorPlan(optional[f"{stem}.input_scale"], (Nvfp4Factors(inputs, is_divisor),))


def _refusal(tensor: OutputTensor, what: str, command: str) -> UsageError:
    return UsageError(
        f"{tensor.spec.name} cannot stay nvfp4: the engine reads no factor {what}",
        facts=[f"{tensor.parts[0].name} is nvfp4 in the source, with a factor for the matrix"],
        tries=[command],
    )
