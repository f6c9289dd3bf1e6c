"""Recipes on the released models' shapes: sizes, padding, and what is said about it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from nanorun.errors import UsageError
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import Role
from nanorun_quant.fit import Fit
from nanorun_quant.fit import fit_recipe as fit_recipe_of
from nanorun_quant.recipe_names import recipe_by_name
from nanorun_quant.recipes import RECIPES
from tests.model.known_archs import LIGHTNING, NANO, NANO_4B, SUPER

GB = 1e9
fit_recipe = partial(fit_recipe_of, again="asked again with {recipe}".format)
# Tensor bytes in GB and true bits per weight: Nano, Lightning, Nano 4B, Super.
STATED = {
    "q8": ((33.58, 8.51), (35.00, 8.51), (4.23, 8.51), (131.60, 8.52)),
    "q6": ((30.25, 7.66), (34.27, 8.33), (4.03, 8.12), (107.99, 6.99)),
    "q5": ((22.45, 5.69), (23.39, 5.69), (3.60, 7.24), (88.06, 5.70)),
    "q4": ((18.23, 4.62), (18.99, 4.62), (2.75, 5.54), (70.84, 4.58)),
    "q3": ((16.03, 4.06), (18.27, 4.44), (2.30, 4.63), (56.99, 3.69)),
    "q2": ((9.71, 2.46), (10.10, 2.46), (2.36, 4.74), (37.47, 2.43)),
    "12g": ((10.45, 2.65), (10.87, 2.64), (3.35, 6.75), (40.92, 2.65)),
    "16g": ((14.37, 3.64), (12.61, 3.06), (2.42, 4.87), (51.23, 3.32)),
    "24g": ((20.73, 5.25), (21.59, 5.25), (3.77, 7.58), (80.91, 5.24)),
    "32g": ((24.40, 6.18), (25.42, 6.18), (4.06, 8.18), (91.87, 5.95)),
    "spark": ((21.64, 5.48), (22.55, 5.48), (4.06, 8.18), (84.65, 5.48)),
    "nvfp4_moe": ((18.89, 4.79), (19.67, 4.78), (3.56, 7.16), (73.82, 4.78)),
    "mxfp4_moe": ((17.97, 4.55), (18.71, 4.55), (3.52, 7.08), (70.21, 4.54)),
}
ARCHS = (NANO, LIGHTNING, NANO_4B, SUPER)


def types_of(fit: Fit, role: Role) -> set[GgmlType]:
    return {fit.assignments[spec.name].type for spec in fit.specs if spec.role is role}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_their_stated_sizes(name: str) -> None:
    fits = [fit_recipe(RECIPES[name], arch) for arch in ARCHS]
    found = tuple((round(fit.tensor_bytes / GB, 2), round(fit.bpw, 2)) for fit in fits)
    assert found == STATED[name]


def test_recipes_of_small_cards_fit_them() -> None:
    assert fit_recipe(RECIPES["16g"], NANO).tensor_bytes <= 14.6 * GB
    assert fit_recipe(RECIPES["12g"], NANO).tensor_bytes <= 10.8 * GB


def test_q4_is_four_bits_and_smaller_than_the_fallback_mix() -> None:
    fit = fit_recipe(RECIPES["q4"], NANO)
    assert fit.tensor_bytes <= 18.9 * GB < 24.5 * GB
    for role in (Role.EXPERT_UP, Role.EXPERT_DOWN):
        assert types_of(fit, role) <= {GgmlType.Q4_K, GgmlType.IQ4_NL, GgmlType.IQ4_XS}


def test_padding_is_taken_only_where_it_pays() -> None:
    assert fit_recipe(RECIPES["q4"], NANO).padding == {}
    assert set(fit_recipe(RECIPES["q3"], NANO).padding) == {"n_embd", "n_ff_exp", "n_ff_shexp"}
    assert set(fit_recipe(RECIPES["q3"], LIGHTNING).padding) == {"n_ff_exp", "n_ff_shexp"}
    assert set(fit_recipe(RECIPES["q3"], SUPER).padding) == {"n_ff_exp"}
    assert fit_recipe(recipe_by_name("q4_0"), NANO).padding == {}


SMALL = replace(NANO, n_embd=320, n_ff_exp=192, n_ff_shexp=320)
"""Pico's row lengths, which padding would make 33 and 60 % longer."""


@pytest.mark.parametrize("name", ["q3", "q6", "Q4_K_M", "Q3_K_M", "Q2_K"])
def test_rows_that_padding_makes_much_longer_stay_as_they_are(name: str) -> None:
    recipe = recipe_by_name(name)
    plain, padded = fit_recipe(recipe, SMALL), fit_recipe(recipe, SMALL, "always")
    assert plain.padding == {}
    assert plain.tensor_bytes < padded.tensor_bytes
    for spec in plain.specs:
        # Nothing is weaker than what the recipe wants.
        wanted = padded.assignments[spec.name].type
        assert plain.assignments[spec.name].type.bpw >= wanted.bpw, spec.name


def test_type_without_a_stand_in_is_padded_whatever_it_takes() -> None:
    assert "n_embd" in fit_recipe(recipe_by_name("q4_k"), SMALL).padding


@pytest.mark.parametrize("name", ["Q4_K_M", "IQ2_XXS", "Q6_K"])
def test_preset_has_a_stand_in_where_rows_cannot_be_padded(name: str) -> None:
    fit = fit_recipe(recipe_by_name(name), LIGHTNING)
    assert "n_embd" not in fit.padding
    reasons = {a.reason for a in fit.assignments.values() if not a.is_first_choice}
    assert any("has blocks of 256, rows are 2688" in reason for reason in reasons)


def test_recipe_that_cannot_be_padded_says_why() -> None:
    with pytest.raises(UsageError) as caught:
        fit_recipe(recipe_by_name("q4_k"), LIGHTNING)
    assert "n_embd cannot be padded: the MTP head ends in a LayerNorm" in caught.value.facts
    with pytest.raises(UsageError) as caught:
        fit_recipe(recipe_by_name("q4_k"), NANO, "never")
    assert "--pad never" in caught.value.facts[-1]


def test_types_that_need_an_imatrix_are_known() -> None:
    assert fit_recipe(RECIPES["16g"], NANO).needs_imatrix == [GgmlType.IQ3_XXS]
    for name in RECIPES.keys() - {"16g"}:
        assert fit_recipe(RECIPES[name], NANO).needs_imatrix == [], name
