"""The zeros that padding puts around the source's tensors, and the factors that go with them.

Which sizes are padded, and why that changes nothing, is in `nanorun_quant.padding`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from nanorun.errors import UsageError
from nanorun.model.arch import HybridArch
from nanorun.model.tensor_roles import Role, TensorSpec, expected_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nanorun_converters.tensors.names import TensorPlan


@dataclass(frozen=True, slots=True)
class Frame:
    """How the rows of one part are padded."""

    n_per_row: int
    """Length of a source row."""
    n_columns: int
    """Zeros after each row."""
    n_rows: int
    """Zero rows after the last."""
    factor: float
    """What every element is multiplied by."""

    @property
    def changes_anything(self) -> bool:
        """Whether the padded tensor differs from its source at all."""
        return bool(self.n_columns or self.n_rows) or self.factor != 1.0

    def apply(self, rows: NDArray[np.float32], *, is_last: bool) -> NDArray[np.float32]:
        """Pad `(n, n_per_row)`, which ends its part if `is_last`."""
        if self.factor != 1.0:
            # In float64, so that one rounding is all that happens.
            rows = (rows.astype(np.float64) * self.factor).astype(np.float32)
        return np.pad(rows, ((0, self.n_rows if is_last else 0), (0, self.n_columns)))


def pad_tensors(
    tensors: Sequence[TensorPlan], arch: HybridArch, padded: HybridArch
) -> list[TensorPlan]:
    """The tensors of `arch`, in the shapes that `padded` gives them."""
    if padded == arch:
        return list(tensors)
    specs = expected_tensors(padded)
    growth = math.sqrt(padded.n_embd / arch.n_embd)
    biases = [t.spec.name for t in tensors if t.spec.role is Role.BIAS]
    if biases:
        raise UsageError(
            f"{biases[0]} is not made for padding", tries=["nanorun convert SOURCE --pad never"]
        )
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


def _frame(spec: TensorSpec, padded: TensorSpec, arch: HybridArch, growth: float) -> Frame | None:
    has_rows = len(spec.shape) > 1
    frame = Frame(
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
