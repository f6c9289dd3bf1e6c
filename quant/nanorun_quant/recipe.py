"""Recipes: which type each tensor of a model gets, by its role, and why.

A recipe is never bent to fit: a role's types are listed in the order they are wanted, and where the
blocks of none of them divide a tensor's rows, the assignment is refused and the types that would
fit are named.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nanorun.errors import UsageError
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import FLOORS, Role, TensorSpec
from nanorun_quant.ggml import QUANTIZERS

ANY_ROLE = "*"
DEFAULT_RECIPE = "q8_0"

Types = tuple[GgmlType, ...]
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


def recipe_by_name(name: str) -> Recipe:
    """The recipe called `name`: one of nanorun's, a ggml type for every role, or a preset's.

    Where a preset of llama.cpp is called like a type, upper case (`Q2_K`) means the preset and
    lower case the type for every role.

    Raises:
        UsageError: If there is none; the nearest are offered.
    """
    from nanorun_quant.presets import PRESETS, preset_by_name
    from nanorun_quant.recipes import RECIPES

    key = name.lower()
    if key in RECIPES and name not in PRESETS:
        return RECIPES[key]
    by_label = {type_.label: type_ for type_ in QUANTIZERS}
    if key in by_label and name not in PRESETS:
        return Recipe(key, 1, by_label[key], summary=f"{key} for every role")
    preset = preset_by_name(name)
    if preset is not None:
        return preset
    near = difflib.get_close_matches(key, [*RECIPES, *by_label, *map(str.lower, PRESETS)], n=1)
    raise UsageError(
        f"there is no recipe {name!r}",
        facts=[
            f"recipes: {' '.join(RECIPES)}",
            f"types: {' '.join(by_label)}",
            f"llama.cpp's presets: {' '.join(PRESETS)}",
            *(f"nearest: {n}" for n in near),
        ],
    )


def writable_type(name: str, what: str = "type") -> GgmlType:
    """The type called `name`, in any case, if this version can write it.

    Raises:
        UsageError: Otherwise, naming those it can.
    """
    by_label = {type_.label: type_ for type_ in QUANTIZERS}
    found = by_label.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), by_label, n=1)
        raise UsageError(
            f"there is no {what} {name!r}",
            facts=[f"{what}s: {' '.join(by_label)}", *(f"nearest: {n}" for n in near)],
        )
    return found


def parse_type_map(entries: Mapping[str, str]) -> dict[str, GgmlType]:
    """The overrides of `--type-map`: role, or `*` for every role, to type.

    Raises:
        UsageError: If a role or a type cannot be meant.
    """
    roles = [role.value for role in FLOORS]
    for role in entries:
        if role != ANY_ROLE and role not in roles:
            near = difflib.get_close_matches(role, roles, n=1)
            raise UsageError(
                f"there is no role {role!r} whose type can be chosen",
                facts=[f"roles: {' '.join(roles)}, or *", *(f"nearest: {n}" for n in near)],
            )
    return {role: writable_type(name) for role, name in entries.items()}


def assign(
    recipe: Recipe, specs: Iterable[TensorSpec], overrides: Mapping[str, GgmlType] | None = None
) -> dict[str, Assignment]:
    """Give every tensor its type.

    Raises:
        UsageError: If no type's blocks divide the rows of a tensor.
    """
    specs = list(specs)
    named = recipe.by_tensor(specs) if recipe.by_tensor else {}
    assignments = {spec.name: _assign(recipe, spec, named, overrides or {}) for spec in specs}
    misfits = [s for s in specs if s.n_per_row % assignments[s.name].type.block_size]
    if misfits:
        _refuse_misfits(misfits, assignments)
    return assignments


def _assign(
    recipe: Recipe,
    spec: TensorSpec,
    named: Mapping[str, Types],
    overrides: Mapping[str, GgmlType],
) -> Assignment:
    if not spec.quantizable:
        return Assignment(GgmlType.F32, "small or sensitive, always f32")
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


def _refuse_misfits(misfits: list[TensorSpec], assignments: Mapping[str, Assignment]) -> None:
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
        tries=[f"nanorun convert SOURCE --recipe {nearest.label}"],
    )
