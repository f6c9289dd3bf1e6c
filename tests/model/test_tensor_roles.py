from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from nanorun.errors import ModelError
from nanorun.model.arch import HybridArch
from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import read_gguf
from nanorun.model.gguf_arch import arch_from_gguf
from nanorun.model.tensor_roles import (
    Role,
    check_tensors,
    expected_tensors,
    optional_tensors,
    role_of,
)
from tests.model.known_archs import (
    LIGHTNING,
    NANO,
    NANO_4B,
    SUPER,
    TINY_DENSE,
    TINY_LATENT_MTP,
    TINY_MOE,
    TINY_PUZZLE,
)
from tests.support.builders import Tensor, arch_tensors, gguf_metadata, write_gguf

ALL = [NANO, LIGHTNING, SUPER, NANO_4B, TINY_MOE, TINY_LATENT_MTP, TINY_PUZZLE, TINY_DENSE]


@pytest.mark.parametrize(("arch", "n_tensors"), [(NANO, 401), (LIGHTNING, 417), (SUPER, 781)])
def test_tensor_counts_are_those_of_published_files(arch: HybridArch, n_tensors: int) -> None:
    assert len(expected_tensors(arch)) == n_tensors


# Shapes of Nano's GGUF (reference: engine.md section 11).
@pytest.mark.parametrize(
    ("name", "role", "shape"),
    [
        ("token_embd.weight", Role.EMBEDDING, (131072, 2688)),
        ("output_norm.weight", Role.NORM, (2688,)),
        ("output.weight", Role.OUTPUT, (131072, 2688)),
        ("blk.0.attn_norm.weight", Role.NORM, (2688,)),
        ("blk.0.ssm_in.weight", Role.SSM_IN, (10304, 2688)),
        ("blk.0.ssm_conv1d.weight", Role.SSM_SMALL, (6144, 4)),
        ("blk.0.ssm_conv1d.bias", Role.SSM_SMALL, (6144,)),
        ("blk.0.ssm_dt.bias", Role.SSM_SMALL, (64,)),
        ("blk.0.ssm_a", Role.SSM_SMALL, (64, 1)),
        ("blk.0.ssm_d", Role.SSM_SMALL, (64, 1)),
        ("blk.0.ssm_norm.weight", Role.NORM, (8, 512)),
        ("blk.0.ssm_out.weight", Role.SSM_OUT, (2688, 4096)),
        ("blk.5.attn_q.weight", Role.ATTN_Q, (4096, 2688)),
        ("blk.5.attn_k.weight", Role.ATTN_K, (256, 2688)),
        ("blk.5.attn_v.weight", Role.ATTN_V, (256, 2688)),
        ("blk.5.attn_output.weight", Role.ATTN_OUT, (2688, 4096)),
        ("blk.1.ffn_gate_inp.weight", Role.ROUTER, (128, 2688)),
        ("blk.1.exp_probs_b.bias", Role.ROUTER, (128,)),
        ("blk.1.ffn_up_exps.weight", Role.EXPERT_UP, (128, 1856, 2688)),
        ("blk.1.ffn_down_exps.weight", Role.EXPERT_DOWN, (128, 2688, 1856)),
        ("blk.1.ffn_up_shexp.weight", Role.SHARED_UP, (3712, 2688)),
        ("blk.1.ffn_down_shexp.weight", Role.SHARED_DOWN, (2688, 3712)),
    ],
)
def test_nano_has_its_shapes(name: str, role: Role, shape: tuple[int, ...]) -> None:
    spec = expected_tensors(NANO)[name]
    assert (spec.role, spec.shape, spec.required) == (role, shape, True)


@pytest.mark.parametrize(
    ("arch", "name", "shape"),
    [
        (SUPER, "blk.1.ffn_latent_down.weight", (1024, 4096)),
        (SUPER, "blk.1.ffn_latent_up.weight", (4096, 1024)),
        (SUPER, "blk.1.ffn_up_exps.weight", (512, 2688, 1024)),
        (SUPER, "blk.1.ffn_down_exps.weight", (512, 1024, 2688)),
        (SUPER, "blk.1.ffn_up_shexp.weight", (5376, 4096)),
        (SUPER, "blk.88.nextn.eh_proj.weight", (4096, 8192)),
        (SUPER, "blk.88.nextn.shared_head_norm.weight", (4096,)),
        (SUPER, "blk.88.attn_q.weight", (4096, 4096)),
        (SUPER, "blk.88.post_attention_norm.weight", (4096,)),
        (SUPER, "blk.88.ffn_up_exps.weight", (512, 2688, 1024)),
        (NANO_4B, "blk.1.ffn_up.weight", (12544, 3136)),
        (NANO_4B, "blk.1.ffn_down.weight", (3136, 12544)),
        (TINY_PUZZLE, "blk.1.ffn_up_exps.weight", (8, 32, 64)),
        (TINY_PUZZLE, "blk.3.ffn_up_exps.weight", (8, 64, 64)),
    ],
)
def test_other_families_have_their_shapes(
    arch: HybridArch, name: str, shape: tuple[int, ...]
) -> None:
    assert expected_tensors(arch)[name].shape == shape


def test_file_order_is_that_of_evaluation() -> None:
    names = list(expected_tensors(TINY_LATENT_MTP))
    blocks = [int(name.split(".")[1]) for name in names if name.startswith("blk.")]
    assert names[0] == "token_embd.weight"
    assert names[-2:] == ["output_norm.weight", "output.weight"]
    assert blocks == sorted(blocks)
    assert set(blocks) == set(range(6))


def test_tied_output_has_no_tensor() -> None:
    assert "output.weight" not in expected_tensors(replace(NANO, tied_embeddings=True))


@pytest.mark.parametrize("arch", ALL)
def test_small_tensors_stay_f32_and_matrices_have_a_floor(arch: HybridArch) -> None:
    for spec in expected_tensors(arch).values():
        is_small = (
            len(spec.shape) == 1
            or spec.role in (Role.NORM, Role.ROUTER, Role.SSM_SMALL)
            or not spec.name.endswith("weight")
        )
        assert spec.quantizable == (not is_small)
        assert spec.allows(GgmlType.F32)
        assert spec.allows(GgmlType.Q8_0) == spec.quantizable
        assert (spec.floor is GgmlType.F32) == is_small


def test_floor_is_lowest_for_routed_experts() -> None:
    specs = expected_tensors(NANO)
    assert specs["blk.1.ffn_up_exps.weight"].allows(GgmlType.IQ2_XXS)
    assert not specs["blk.1.ffn_up_exps.weight"].allows(GgmlType.IQ1_M)
    assert not specs["blk.0.ssm_in.weight"].allows(GgmlType.IQ3_S)
    assert all(s.allows(GgmlType.MXFP4) for s in specs.values() if s.quantizable)


@pytest.mark.parametrize("arch", ALL)
def test_role_of_knows_every_name(arch: HybridArch) -> None:
    for spec in (expected_tensors(arch) | optional_tensors(arch)).values():
        assert role_of(spec.name) is spec.role


@pytest.mark.parametrize(
    "name",
    ["", "token_embd", "blk.0", "blk.x.ssm_in.weight", "blk.01.ssm_a", "blk.0.ffn_gate.weight"],
)
def test_role_of_refuses_foreign_names(name: str) -> None:
    with pytest.raises(ModelError, match=re.escape(repr(name))):
        role_of(name)


def test_optional_tensors_are_biases_and_factors() -> None:
    optional = optional_tensors(TINY_LATENT_MTP)
    assert optional["blk.2.attn_q.bias"].shape == (128,)
    assert optional["blk.1.ffn_up_exps.scale"].shape == (8,)
    assert optional["blk.1.ffn_up_shexp.input_scale"].shape == (1,)
    assert optional["output.scale"].shape == (1,)
    assert optional_tensors(TINY_DENSE)["blk.1.ffn_up.bias"].shape == (128,)
    assert "blk.1.ffn_latent_up.scale" not in optional
    assert not any(spec.required for spec in optional.values())


def check(path: Path, arch: HybridArch, tensors: list[Tensor]) -> None:
    file = read_gguf(write_gguf(path / "m.gguf", gguf_metadata(arch), tensors))
    check_tensors(file, arch_from_gguf(file))


@pytest.mark.parametrize("arch", [TINY_MOE, TINY_LATENT_MTP, TINY_PUZZLE, TINY_DENSE])
def test_complete_file_passes(arch: HybridArch, tmp_path: Path) -> None:
    check(tmp_path, arch, arch_tensors(arch, GgmlType.Q8_0))


def test_optional_tensors_may_be_there(tmp_path: Path) -> None:
    factor = Tensor("blk.1.ffn_up_exps.scale", GgmlType.F32, (8,))
    check(tmp_path, TINY_MOE, [*arch_tensors(TINY_MOE), factor])


def test_only_an_nvfp4_output_has_factors(tmp_path: Path) -> None:
    factor = Tensor("output.scale", GgmlType.F32, (1,))
    nvfp4 = [
        replace(t, type=GgmlType.NVFP4) if t.name == "output.weight" else t
        for t in arch_tensors(TINY_MOE)
    ]
    check(tmp_path, TINY_MOE, [*nvfp4, factor])
    with pytest.raises(ModelError, match=r"tensor 'output\.scale': expected no such tensor"):
        check(tmp_path, TINY_MOE, [*arch_tensors(TINY_MOE), factor])


def test_missing_tensor_is_named_with_its_shape(tmp_path: Path) -> None:
    tensors = [t for t in arch_tensors(TINY_MOE) if t.name != "blk.0.ssm_in.weight"]
    message = r"m\.gguf: tensor 'blk\.0\.ssm_in\.weight': expected shape \[196, 64\], found no such"
    with pytest.raises(ModelError, match=message):
        check(tmp_path, TINY_MOE, tensors)


def test_wrong_shape_is_named_with_both(tmp_path: Path) -> None:
    tensors = [
        replace(t, shape=(64, 128)) if t.name == "blk.2.attn_q.weight" else t
        for t in arch_tensors(TINY_MOE)
    ]
    with pytest.raises(ModelError, match=r"expected shape \[128, 64\], found \[64, 128\]"):
        check(tmp_path, TINY_MOE, tensors)


def test_foreign_tensor_is_named(tmp_path: Path) -> None:
    extra = Tensor("blk.0.ffn_gate.weight", GgmlType.F32, (4,))
    with pytest.raises(ModelError, match=r"tensor 'blk\.0\.ffn_gate\.weight': expected no such"):
        check(tmp_path, TINY_MOE, [*arch_tensors(TINY_MOE), extra])
