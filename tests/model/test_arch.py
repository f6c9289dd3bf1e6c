from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanorun.errors import ModelError
from nanorun.model.arch import HybridArch, LayerKind, parse_pattern
from nanorun.model.gguf import GgufFile, read_gguf
from nanorun.model.gguf_arch import arch_from_gguf
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
from tests.support.builders import arch_tensors, gguf_metadata, write_gguf

ALL = [NANO, LIGHTNING, SUPER_TRUNK, SUPER, NANO_4B]
TINY = [TINY_MOE, TINY_LATENT_MTP, TINY_PUZZLE, TINY_DENSE]


def header_of(arch: HybridArch, folder: Path, changes: dict[str, Any]) -> GgufFile:
    """A header-only GGUF of `arch` with some keys changed; a value of None removes the key.

    Keys without a prefix of their own are the architecture's.
    """
    kv = gguf_metadata(arch)
    for name, value in changes.items():
        has_prefix = name.startswith(("general.", "tokenizer.", "nanorun."))
        kv[name if has_prefix else f"{arch.name}.{name}"] = value
    kv = {key: value for key, value in kv.items() if value is not None}
    write_gguf(folder / "m.gguf", kv, arch_tensors(arch), with_data=False)
    return read_gguf(folder / "m.gguf", check_data=False)


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


@pytest.mark.parametrize("arch", TINY)
def test_gguf_metadata_gives_the_architecture_back(arch: HybridArch, tmp_path: Path) -> None:
    assert arch_from_gguf(header_of(arch, tmp_path, {})) == arch


def test_output_may_be_the_embedding(tmp_path: Path) -> None:
    arch = replace(TINY_MOE, tied_embeddings=True)
    assert arch_from_gguf(header_of(arch, tmp_path, {})) == arch


def test_missing_keys_have_llama_cpps_defaults(tmp_path: Path) -> None:
    missing = (
        "attention.layer_norm_rms_epsilon",
        "expert_group_count",
        "expert_group_used_count",
        "moe_latent_size",
        "nextn_predict_layers",
    )
    assert arch_from_gguf(header_of(TINY_MOE, tmp_path, dict.fromkeys(missing))) == TINY_MOE


def test_expert_width_may_be_given_for_all_used_experts_together(tmp_path: Path) -> None:
    changes = {"expert_feed_forward_length": None, "feed_forward_length": [0, 96, 0, 96, 0]}
    assert arch_from_gguf(header_of(TINY_MOE, tmp_path, changes)).n_ff_exp == 32


def test_vocabulary_may_be_a_number(tmp_path: Path) -> None:
    changes = {"tokenizer.ggml.tokens": None, "vocab_size": 16}
    assert arch_from_gguf(header_of(TINY_MOE, tmp_path, changes)).n_vocab == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "llama"}, "not a Nemotron-H model"),
        ({"general.architecture": None}, "general.architecture"),
        ({"general.architecture": 7}, "expected str, found int"),
        ({"block_count": None}, "block_count': expected int, found no such key"),
        ({"block_count": 0}, "expected 1 to 512"),
        ({"block_count": 4_000_000}, "found 4000000 blocks"),
        ({"block_count": 6}, "expected 6 entries, one a block, found 5"),
        ({"block_count": True}, "expected int, found bool"),
        ({"embedding_length": "wide"}, "embedding_length': expected int, found str"),
        ({"embedding_length": 2**40}, "expected a number from 0 to 2147483647"),
        ({"feed_forward_length": [0.0] * 5}, "expected whole numbers from 0, found 0.0"),
        ({"feed_forward_length": [0, 32, 0, -1, 0]}, "expected whole numbers from 0, found -1"),
        ({"attention.head_count": [4, 4, 0, 4, 4]}, "n_head: expected a positive number, found 0"),
        ({"attention.value_length": 16}, "expected 32 as key_length, found 16"),
        ({"ssm.group_count": 0}, "ssm_n_group: expected a positive number"),
        ({"nextn_predict_layers": 5}, "5 of them MTP"),
        (
            {"expert_used_count": 100},
            "expert_used_count': expected at most expert_count 8, found 100",
        ),
        ({"nanorun.layer_pattern": "MEMEM"}, "nanorun.layer_pattern': expected 'ME*EM'"),
    ],
)
def test_wrong_metadata_is_refused_with_the_file(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    gguf = header_of(TINY_MOE, tmp_path, changes)
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        arch_from_gguf(gguf)
    assert "m.gguf" in caught.value.message


def test_dense_layers_must_agree_on_their_width(tmp_path: Path) -> None:
    gguf = header_of(TINY_DENSE, tmp_path, {"feed_forward_length": [0, 128, 0, 64]})
    with pytest.raises(ModelError, match=r"one size for all such layers, found \[64, 128\]"):
        arch_from_gguf(gguf)
