"""What a person types for a recipe, a type or a role, and what it stands for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from nanorun.errors import UsageError
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import FLOORS
from nanorun_quant.presets import PRESETS, preset_by_name
from nanorun_quant.recipe import ANY_ROLE, Recipe
from nanorun_quant.recipes import RECIPES
from nanorun_quant.writable_types import QUANTIZERS

_BY_LABEL = {type_.label: type_ for type_ in QUANTIZERS}


def recipe_by_name(name: str) -> Recipe:
    """The recipe called `name`: one of nanorun's, a ggml type for every role, or a preset's.

    Where a preset of llama.cpp is called like a type, upper case (`Q2_K`) means the preset and
    lower case the type for every role.

    Raises:
        UsageError: If there is none; the nearest are offered.
    """
    key = name.lower()
    if key in RECIPES and name not in PRESETS:
        return RECIPES[key]
    if key in _BY_LABEL and name not in PRESETS:
        return Recipe(key, 1, _BY_LABEL[key], summary=f"{key} for every role")
    preset = preset_by_name(name)
    if preset is not None:
        return preset
    near = difflib.get_close_matches(key, [*RECIPES, *_BY_LABEL, *map(str.lower, PRESETS)], n=1)
    raise UsageError(
        f"there is no recipe {name!r}",
        facts=[
            f"recipes: {' '.join(RECIPES)}",
            f"types: {' '.join(_BY_LABEL)}",
            f"llama.cpp's presets: {' '.join(PRESETS)}",
            *(f"nearest: {n}" for n in near),
        ],
    )


def writable_type(name: str, what: str = "type") -> GgmlType:
    """The type called `name`, in any case, if this version can write it.

    Raises:
        UsageError: Otherwise, naming those it can.
    """
    found = _BY_LABEL.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), _BY_LABEL, n=1)
        raise UsageError(
            f"there is no {what} {name!r}",
            facts=[f"{what}s: {' '.join(_BY_LABEL)}", *(f"nearest: {n}" for n in near)],
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
