"""Recipes: which type each tensor of a model gets, by its role, and why.

A recipe is never bent to fit: a role's types are listed in the order they are wanted, and where the
blocks of none of them divide a tensor's rows, the assignment is refused and the types that would
fit are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nanorun.errors import UsageError
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import Role, TensorSpec
from nanorun_quant.writable_types import QUANTIZERS

ANY_ROLE = "*"
DEFAULT_RECIPE = "q8_0"

Types = tuple[GgmlType, ...]
Again = Callable[..., str]
"""What a person types to ask for the same with other options: `again(pad="never")`. An error that
knows which option would help, but not what was typed, makes its suggestion with it."""
ByTensor = Callable[[Sequence[TensorSpec]], Mapping[str, Types]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A type for every role that may be quantized."""

    name: str
    version: int
    """Raised whenever the same name would give other types than before."""
    type: GgmlType
    types: Mapping[Role, Types] = field(default_factory=dict)
    """Roles with types of their own, each list in the order they are wanted."""
    summary: str = ""
    pads: bool = True
    """Whether rows are padded for a role's first type; where not, the next one is as good."""
    by_tensor: ByTensor | None = None
    """Types by the tensor's name, stronger than `types`: rules that look at layers."""

    def types_of(self, role: Role) -> Types:
        """The types for tensors of `role`, the most wanted first."""
        return self.types.get(role, (self.type,))


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one tensor becomes, and why, in a few words."""

    type: GgmlType
    reason: str
    is_first_choice: bool = True
    """Whether this is the type the recipe wanted most."""


KEPT_F32 = Assignment(GgmlType.F32, "small or sensitive, always f32")
"""Of a tensor that no recipe may quantize."""


def assign(
    recipe: Recipe,
    specs: Iterable[TensorSpec],
    overrides: Mapping[str, GgmlType] | None = None,
    *,
    again: Again,
) -> dict[str, Assignment]:
    """Give every tensor its type, by the tensor's name.

    Args:
        recipe: Says which.
        specs: The tensors, all of one model.
        overrides: Role, or `*` for every role, to type; stronger than the recipe.
        again: Makes the command that an error suggests.

    Raises:
        UsageError: If no type's blocks divide the rows of a tensor.
    """
    specs = list(specs)
    named = recipe.by_tensor(specs) if recipe.by_tensor else {}
    assignments = {spec.name: _assign(recipe, spec, named, overrides or {}) for spec in specs}
    misfits = [s for s in specs if s.n_per_row % assignments[s.name].type.block_size]
    if misfits:
        _refuse_misfits(misfits, assignments, again)
    return assignments


def _assign(
    recipe: Recipe,
    spec: TensorSpec,
    named: Mapping[str, Types],
    overrides: Mapping[str, GgmlType],
) -> Assignment:
    if not spec.quantizable:
        return KEPT_F32
    for key in (spec.role.value, ANY_ROLE):
        if key in overrides:
            return Assignment(overrides[key], f"type map {key}={overrides[key].label}")
    first, *others = named.get(spec.name) or recipe.types_of(spec.role)
    if spec.n_per_row % first.block_size:
        for type_ in others:
            if spec.n_per_row % type_.block_size == 0:
                why = f"{first.label} has blocks of {first.block_size}, rows are {spec.n_per_row}"
                return Assignment(type_, f"recipe {recipe.name}, next choice: {why}", False)
    return Assignment(first, f"recipe {recipe.name}")


def _refuse_misfits(
    misfits: list[TensorSpec], assignments: Mapping[str, Assignment], again: Again
) -> None:
    first = misfits[0]
    type_ = assignments[first.name].type
    by_role = {spec.role: spec.n_per_row for spec in misfits}
    rows = ", ".join(f"{role.value} {n_per_row}" for role, n_per_row in by_role.items())
    fitting = [t for t in QUANTIZERS if not any(s.n_per_row % t.block_size for s in misfits)]
    nearest = min(fitting, key=lambda t: (t.bpw < type_.bpw, abs(t.bpw - type_.bpw)))
    raise UsageError(
        f"{type_.label} stores blocks of {type_.block_size}, which do not divide the rows of"
        f" {first.name} ({first.n_per_row})",
        facts=[
            f"rows that do not fit: {rows}",
            f"types that fit them: {' '.join(t.label for t in fitting)}",
        ],
        tries=[again(recipe=nearest.label, type_map={})],
    )
