"""A recipe put on a model's shape: the padding that goes with it, each tensor's type, the bytes.

Needs no weights, so the converter, `--dry-run` and the planner get the same figures from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanorun.errors import UsageError
from nanorun.model.arch import HybridArch
from nanorun.model.footprint import tensor_bytes
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import TensorSpec, expected_tensors
from nanorun_quant.padding import Padding, pad_arch, paddings, refusals
from nanorun_quant.recipe import Again, Assignment, Recipe, assign
from nanorun_quant.writable_types import NEED_IMATRIX

MAX_GROWTH = 1.25
"""Padding 3-bit rows by more makes them larger than 4-bit ones that need none. Nano's sizes grow by
3 to 10 %."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What a recipe makes of a shape."""

    recipe: Recipe
    arch: HybridArch
    """After padding."""
    padding: Padding
    assignments: Mapping[str, Assignment]
    """By the tensor's name."""
    n_params: int
    """Numbers in the model before padding."""
    table: Sequence[str] = ()
    """What a search found, `name=type:cost` a tensor."""

    @property
    def specs(self) -> Sequence[TensorSpec]:
        """The tensors, in file order, in their padded shapes."""
        return list(expected_tensors(self.arch).values())

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors' data."""
        return sum(tensor_bytes(spec, self.assignments[spec.name].type) for spec in self.specs)

    @property
    def bpw(self) -> float:
        """Bits per weight of the model: what padding adds counts, its zeros are no weights."""
        return 8 * self.tensor_bytes / self.n_params

    @property
    def needs_imatrix(self) -> list[GgmlType]:
        """Types among these that need an imatrix; the embedding and the output never do."""
        types = {
            self.assignments[spec.name].type for spec in self.specs if spec.name.startswith("blk.")
        }
        return sorted(types & NEED_IMATRIX)


def count_params(arch: HybridArch) -> int:
    """Numbers in all tensors that a model of this shape must have."""
    return sum(spec.n_elements for spec in expected_tensors(arch).values())


def fit_recipe(
    recipe: Recipe,
    arch: HybridArch,
    pad: str = "auto",
    overrides: Mapping[str, GgmlType] | None = None,
    *,
    again: Again,
) -> Fit:
    """Put a recipe on a shape.

    With `auto`, a recipe that pads gets the padding with which most weights have their first
    choice, and the fewest bytes among those; every other recipe is padded only where it would not
    fit otherwise. No size grows by more than `MAX_GROWTH` where the recipe fits without.

    Args:
        recipe: The recipe.
        arch: The shape before padding.
        pad: One of `PAD_MODES`.
        overrides: Role, or `*` for every role, to type; stronger than the recipe.
        again: Makes the command that an error suggests.

    Raises:
        UsageError: If the recipe fits the shape with no padding that `pad` and the model allow.
    """
    fits, refused = [], None
    for padding in paddings(arch, pad):
        try:
            fits.append(_fit(recipe, arch, padding, overrides, again))
        except UsageError as error:
            refused = refused or error
            continue
        if pad == "auto" and not recipe.pads:
            break
    if not fits:
        assert refused is not None
        raise _explained(refused, arch, pad)
    small = [fit for fit in fits if all(to <= MAX_GROWTH * n for n, to in fit.padding.values())]
    return min((small if pad == "auto" else fits) or fits, key=_cost)


def _fit(
    recipe: Recipe,
    arch: HybridArch,
    padding: Padding,
    overrides: Mapping[str, GgmlType] | None,
    again: Again,
) -> Fit:
    padded = pad_arch(arch, padding)
    assignments = assign(recipe, expected_tensors(padded).values(), overrides, again=again)
    return Fit(recipe, padded, padding, assignments, count_params(arch))


def _cost(fit: Fit) -> tuple[int, int]:
    """Weights whose type is not the first choice, then bytes."""
    others = [spec for spec in fit.specs if not fit.assignments[spec.name].is_first_choice]
    return sum(spec.n_elements for spec in others), fit.tensor_bytes


def _explained(error: UsageError, arch: HybridArch, pad: str) -> UsageError:
    """The misfit, with why padding did not help."""
    why = [f"{name} cannot be padded: {reason}" for name, reason in refusals(arch).items()]
    if pad == "never":
        why = ["--pad never: padding could make rows whole blocks"]
    return UsageError(error.message, facts=[*error.facts, *why], tries=error.tries)
