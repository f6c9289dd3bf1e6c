"""The zeros that padding puts around the source's tensors, and the factors that go with them.

Which sizes are padded, and why that changes nothing, is in `nanorun_quant.padding`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from nanorun.errors import UsageError
from nanorun.model.arch import HybridArch
from nanorun.model.tensor_roles import Role, TensorSpec, expected_tensors
from nanorun_converters.tensors.tensor_plan import PadFrame, TensorPlan
from nanorun_quant.recipe import Again


def pad_tensors(
    tensors: Sequence[TensorPlan], arch: HybridArch, padded: HybridArch, *, again: Again
) -> list[TensorPlan]:
    """The tensors of `arch`, in the shapes that `padded` gives them.

    Raises:
        UsageError: If there is a bias, which no padding was made for; it suggests what `again`
            makes of leaving the padding out.
    """
    if padded == arch:
        return list(tensors)
    specs = expected_tensors(padded)
    growth = math.sqrt(padded.n_embd / arch.n_embd)
    biases = [t.spec.name for t in tensors if t.spec.role is Role.BIAS]
    if biases:
        raise UsageError(f"{biases[0]} is not made for padding", tries=[again(pad="never")])
    # A factor beside a weight is one number, whatever the weight's size.
    return [
        replace(t, spec=specs[t.spec.name], frame=_frame(t.spec, specs[t.spec.name], arch, growth))
        if t.spec.name in specs
        else t
        for t in tensors
    ]


# What adds to the residual stream, beside the embedding.
_WRITERS = (
    Role.EMBEDDING, Role.SSM_OUT, Role.ATTN_OUT, Role.SHARED_DOWN, Role.LATENT_UP, Role.FFN_DOWN,
)  # fmt: skip


def _frame(
    spec: TensorSpec, padded: TensorSpec, arch: HybridArch, growth: float
) -> PadFrame | None:
    has_rows = len(spec.shape) > 1
    frame = PadFrame(
        n_per_row=spec.n_per_row,
        n_columns=padded.n_per_row - spec.n_per_row,
        n_rows=padded.shape[-2] - spec.shape[-2] if has_rows else 0,
        factor=_factor(spec, arch, growth),
    )
    return frame if frame.changes_anything else None


def _factor(spec: TensorSpec, arch: HybridArch, growth: float) -> float:
    """The power of `growth` by which a tensor is scaled."""
    is_writer = spec.role in _WRITERS or (spec.role is Role.EXPERT_DOWN and not arch.n_latent)
    if is_writer:
        return growth
    if spec.name == "output_norm.weight" and arch.tied_embeddings:
        # The grown embedding is the output too.
        return growth**-2
    if spec.name.endswith(("attn_norm.weight", "output_norm.weight")):
        return 1 / growth
    return 1.0
