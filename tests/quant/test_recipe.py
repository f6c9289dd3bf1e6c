"""Recipes: the type of each tensor, and what is refused."""

from __future__ import annotations

from functools import partial

import pytest

from nanorun.errors import UsageError
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import FLOORS, Role, TensorSpec, expected_tensors
from nanorun_quant.recipe import Assignment, Recipe
from nanorun_quant.recipe import assign as assign_types
from nanorun_quant.recipe_names import parse_type_map, recipe_by_name
from nanorun_quant.recipes import RECIPES
from nanorun_quant.writable_types import QUANTIZERS
from tests.model.known_archs import NANO, TINY_MOE

SPECS = list(expected_tensors(TINY_MOE).values())
assign = partial(assign_types, again="asked again with {recipe}".format)


@pytest.mark.parametrize("type_", QUANTIZERS, ids=lambda type_: type_.label)
def test_name_of_a_type_is_a_recipe_of_that_type(type_: GgmlType) -> None:
    recipe = recipe_by_name(type_.label)
    assert (recipe.name, recipe.type) == (type_.label, type_)
    assert {recipe.types_of(role) for role in Role} == {(type_,)}


def test_only_roles_that_may_be_are_quantized() -> None:
    assignments = assign(recipe_by_name("q8_0"), SPECS)
    for spec in SPECS:
        expected = GgmlType.Q8_0 if spec.quantizable else GgmlType.F32
        assert assignments[spec.name].type is expected
    assert assignments["blk.0.ssm_conv1d.weight"].type is GgmlType.F32
    assert assignments["blk.1.ffn_gate_inp.weight"].type is GgmlType.F32


def test_role_is_stronger_than_star_and_star_than_the_recipe() -> None:
    overrides = parse_type_map({"*": "q4_0", "expert_up": "MXFP4"})
    assignments = assign(recipe_by_name("q8_0"), SPECS, overrides)
    assert assignments["blk.1.ffn_up_exps.weight"] == Assignment(
        GgmlType.MXFP4, "type map expert_up=mxfp4"
    )
    assert assignments["output.weight"] == Assignment(GgmlType.Q4_0, "type map *=q4_0")
    assert assignments["output_norm.weight"].type is GgmlType.F32


def test_recipe_may_differ_by_role() -> None:
    recipe = Recipe("mixed", 1, GgmlType.Q4_0, {Role.OUTPUT: (GgmlType.Q8_0,)})
    assignments = assign(recipe, SPECS)
    assert assignments["output.weight"] == Assignment(GgmlType.Q8_0, "recipe mixed")
    assert assignments["token_embd.weight"].type is GgmlType.Q4_0


@pytest.mark.parametrize("name", ["q4_k", "q5_k", "q6_k"])
def test_k_quants_of_nano_are_refused_and_the_nearest_that_fits_is_offered(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        assign(recipe_by_name(name), expected_tensors(NANO).values())
    error = caught.value
    assert f"{name} stores blocks of 256" in error.message
    assert "token_embd.weight (2688)" in error.message
    assert "expert_down 1856" in error.facts[0]
    assert "ssm_out" not in error.facts[0]
    assert error.facts[1].endswith("bf16 q8_0 q5_1 q5_0 q4_1 q4_0 iq4_nl nvfp4 mxfp4 q2_0")
    nearest = {"q4_k": "q4_0", "q5_k": "q5_0", "q6_k": "q8_0"}[name]
    assert error.tries == (f"asked again with {nearest}",)


def test_row_of_no_block_leaves_the_plain_types() -> None:
    odd = TensorSpec("output.weight", Role.OUTPUT, (8, 33))
    with pytest.raises(UsageError) as caught:
        assign(recipe_by_name("q8_0"), [odd])
    assert caught.value.facts[1] == "types that fit them: f32 f16 bf16"


@pytest.mark.parametrize("name", ["q9_9", "", "tq1_0", "Q4_K_L"])
def test_unknown_recipe_is_refused_naming_the_known(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_by_name(name)
    assert f"there is no recipe {name!r}" in caught.value.message
    assert "16g" in caught.value.facts[0]
    assert "iq4_nl" in caught.value.facts[1]
    assert "Q4_K_M" in caught.value.facts[2]


def test_next_choice_is_taken_where_the_first_does_not_fit_and_says_so() -> None:
    recipe = Recipe("mixed", 1, GgmlType.Q8_0, {Role.OUTPUT: (GgmlType.Q4_K, GgmlType.IQ4_NL)})
    output = assign(recipe, SPECS)["output.weight"]
    assert output == Assignment(
        GgmlType.IQ4_NL,
        "recipe mixed, next choice: q4_k has blocks of 256, rows are 64",
        is_first_choice=False,
    )


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_keep_the_floors_of_all_roles(name: str) -> None:
    recipe = RECIPES[name]
    for role, floor in FLOORS.items():
        assert all(type_.bpw >= floor.bpw for type_ in recipe.types_of(role)), role


def test_case_tells_a_preset_from_a_type() -> None:
    assert recipe_by_name("q2_k").by_tensor is None
    assert recipe_by_name("Q2_K").by_tensor is not None
    assert recipe_by_name("q4_k_m").name == "Q4_K_M"


@pytest.mark.parametrize("role", ["experts_up", "norm", "router", ""])
def test_role_that_cannot_be_chosen_is_refused(role: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_type_map({role: "q8_0"})
    assert f"no role {role!r}" in caught.value.message
    assert "expert_up" in caught.value.facts[0]
