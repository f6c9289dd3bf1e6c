from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from nanorun.errors import ModelError
from nanorun.model.arch import HybridArch, LayerKind, parse_pattern
from tests.model.known_archs import (
    LIGHTNING,
    NANO,
    NANO_4B,
    SUPER,
    SUPER_TRUNK,
    TINY_DENSE,
    TINY_LATENT_MTP,
    TINY_MOE,
    TINY_PUZZLE,
)

ALL = [NANO, LIGHTNING, SUPER_TRUNK, SUPER, NANO_4B]
TINY = [TINY_MOE, TINY_LATENT_MTP, TINY_PUZZLE, TINY_DENSE]


def test_pattern_letters_are_layer_kinds() -> None:
    assert parse_pattern("M*-E") == (
        LayerKind.SSM,
        LayerKind.ATTENTION,
        LayerKind.MLP,
        LayerKind.MOE,
    )
    assert TINY_MOE.pattern == "ME*EM"


@pytest.mark.parametrize("text", ["", "MXM", "M E", "m"])
def test_pattern_of_other_letters_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="layer pattern"):
        parse_pattern(text)


@pytest.mark.parametrize(
    ("arch", "n_ssm", "n_wide", "n_attention", "name"),
    [
        (NANO, 23, 23, 6, "nemotron_h_moe"),
        (SUPER, 40, 40, 8, "nemotron_h_moe"),
        (NANO_4B, 21, 17, 4, "nemotron_h"),
    ],
)
def test_released_models_have_their_layers(
    arch: HybridArch, n_ssm: int, n_wide: int, n_attention: int, name: str
) -> None:
    n_mlp_or_moe = arch.n_layers_of(LayerKind.MLP) + arch.n_layers_of(LayerKind.MOE)
    assert arch.n_layers_of(LayerKind.SSM) == n_ssm
    assert n_mlp_or_moe == n_wide
    assert arch.n_layers_of(LayerKind.ATTENTION) == n_attention
    assert arch.name == name


@pytest.mark.parametrize("arch", [*ALL, *TINY])
def test_sound_architectures_are_valid(arch: HybridArch) -> None:
    arch.validate()


def test_puzzle_sizes_vary_by_layer() -> None:
    assert [TINY_PUZZLE.n_ff_exp_at(i) for i in (1, 3)] == [32, 64]
    assert [TINY_PUZZLE.n_expert_used_at(i) for i in (1, 3)] == [3, 2]
    assert TINY_MOE.n_ff_exp_at(3) == 32
    assert replace(TINY_PUZZLE, n_layer_nextn=1).n_ff_exp_at(5) == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ()}, "n_layer: expected 1 to 512, found 0"),
        ({"layers": parse_pattern("M" * 513)}, "n_layer: expected 1 to 512, found 513"),
        ({"layers": parse_pattern("ME-")}, "not both, found ME-"),
        ({"layers": parse_pattern("M*")}, "expected a MoE layer (E), found M*"),
        ({"n_vocab": 0}, "n_vocab: expected a positive number, found 0"),
        ({"n_layer_nextn": 2}, "n_layer_nextn: expected 0 or 1, found 2"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"n_head": 5}, "n_head: expected a multiple of n_head_kv (2), found 5"),
        ({"ssm_d_conv": 1}, "ssm_d_conv: expected 2 or more"),
        ({"ssm_d_inner": 66}, "ssm_d_inner: expected a multiple of ssm_dt_rank (4), found 66"),
        ({"ssm_n_group": 3}, "ssm_d_inner: expected a multiple of ssm_n_group (3)"),
        ({"ssm_dt_rank": 1}, "ssm_dt_rank: expected a multiple of ssm_n_group (2)"),
        ({"n_expert": 1}, "n_expert: expected 2 to 1024, found 1"),
        ({"n_expert": 1025}, "n_expert: expected 2 to 1024, found 1025"),
        ({"n_expert_used": 9}, "n_expert_used of layer 1: expected 1 to 8, found 9"),
        ({"n_expert_shared": 0}, "n_expert_shared"),
        ({"n_ff_exp": 0}, "n_ff_exp of layer 1"),
        ({"n_ff_shexp": 0}, "n_ff_shexp"),
        ({"n_latent": -1}, "n_latent"),
        ({"expert_weights_scale": float("inf")}, "expert_weights_scale"),
        ({"n_expert_group": 3}, "n_expert: expected a multiple of n_expert_group (3), found 8"),
        ({"n_expert_group": 8}, "n_expert_group"),
        ({"n_expert_group": 2, "n_expert_group_used": 2}, "n_expert_group_used: expected 1 to 1"),
        ({"n_ff_exp_per_layer": (1, 2)}, "n_ff_exp_per_layer: expected 5 entries, found 2"),
    ],
)
def test_impossible_sizes_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        replace(TINY_MOE, **changes).validate()


def test_dense_layers_need_a_width() -> None:
    with pytest.raises(ModelError, match="n_ff: expected a positive number"):
        replace(TINY_DENSE, n_ff=0).validate()
