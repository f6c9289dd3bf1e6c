"""Finding the source of each GGUF tensor, and refusing what is missing, misshapen or left over."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nanorun.errors import ModelError
from nanorun.model.tensor_roles import Role
from nanorun_converters.family.config import arch_from_config
from nanorun_converters.source.open import open_source
from nanorun_converters.tensors.names import plan_tensors
from nanorun_converters.tensors.tensor_plan import TensorPlan, pieces_of
from tests.support.source_models import Tensors, write_json, write_source_model, write_weights


def plans_of(folder: Path) -> dict[str, TensorPlan]:
    source = open_source(folder)
    arch = arch_from_config(source.read_json("config.json"), "config.json")
    return {plan.spec.name: plan for plan in plan_tensors(source, arch)}


def values_of(plan: TensorPlan) -> np.ndarray:
    rows = [piece.read() for piece in pieces_of(plan, 10**9)]
    return np.concatenate(rows).reshape(plan.spec.shape)


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        plans_of(folder)
    return caught.value.message


@pytest.fixture
def written() -> Tensors:
    return {}


def test_each_tensor_is_what_the_engine_wants(tmp_path: Path, written: Tensors) -> None:
    folder = write_source_model(
        tmp_path, pattern="ME*", dtype="F32", edit=written.update, moe_latent_size=32
    )
    plans = plans_of(folder)
    found = {name: values_of(plan) for name, plan in plans.items()}
    mixers = [f"backbone.layers.{i}.mixer." for i in range(3)]
    experts = [written[f"{mixers[1]}experts.{i}.up_proj.weight"] for i in range(4)]
    expected = {
        "token_embd.weight": written["backbone.embeddings.weight"],
        "output.weight": written["lm_head.weight"],
        "output_norm.weight": written["backbone.norm_f.weight"],
        "blk.0.attn_norm.weight": written["backbone.layers.0.norm.weight"],
        "blk.0.ssm_in.weight": written[f"{mixers[0]}in_proj.weight"],
        "blk.0.ssm_conv1d.weight": written[f"{mixers[0]}conv1d.weight"][:, 0],
        "blk.0.ssm_conv1d.bias": written[f"{mixers[0]}conv1d.bias"],
        "blk.0.ssm_dt.bias": written[f"{mixers[0]}dt_bias"],
        "blk.0.ssm_d": written[f"{mixers[0]}D"][:, None],
        "blk.0.ssm_norm.weight": written[f"{mixers[0]}norm.weight"].reshape(2, 64),
        "blk.0.ssm_out.weight": written[f"{mixers[0]}out_proj.weight"],
        "blk.1.ffn_gate_inp.weight": written[f"{mixers[1]}gate.weight"],
        "blk.1.exp_probs_b.bias": written[f"{mixers[1]}gate.e_score_correction_bias"],
        "blk.1.ffn_latent_down.weight": written[f"{mixers[1]}fc1_latent_proj.weight"],
        "blk.1.ffn_latent_up.weight": written[f"{mixers[1]}fc2_latent_proj.weight"],
        "blk.1.ffn_up_exps.weight": np.stack(experts),
        "blk.1.ffn_down_shexp.weight": written[f"{mixers[1]}shared_experts.down_proj.weight"],
        "blk.2.attn_q.weight": written[f"{mixers[2]}q_proj.weight"],
        "blk.2.attn_output.weight": written[f"{mixers[2]}o_proj.weight"],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    decay = -np.exp(written[f"{mixers[0]}A_log"].astype(np.float64))
    np.testing.assert_allclose(found["blk.0.ssm_a"][:, 0], decay, rtol=6e-8)


def test_dense_layers_are_found(tmp_path: Path, written: Tensors) -> None:
    folder = write_source_model(tmp_path, pattern="M-*", dtype="F32", edit=written.update)
    plans = plans_of(folder)
    for gguf, name in (("ffn_up", "up_proj"), ("ffn_down", "down_proj")):
        found = values_of(plans[f"blk.1.{gguf}.weight"])
        np.testing.assert_array_equal(found, written[f"backbone.layers.1.mixer.{name}.weight"])


def test_stacked_experts_equal_single_ones(tmp_path: Path) -> None:
    single = write_source_model(tmp_path / "single", dtype="F32")
    source = open_source(single)
    tensors = {
        name: tensor.read(0, tensor.n_elements).reshape(tensor.shape)
        for name, tensor in source.tensors.items()
    }
    for i in (1, 3):
        for projection in ("up_proj", "down_proj"):
            experts = f"backbone.layers.{i}.mixer.experts"
            parts = [tensors.pop(f"{experts}.{e}.{projection}.weight") for e in range(4)]
            tensors[f"{experts}.{projection}"] = np.stack(parts)
    stacked = write_source_model(tmp_path / "stacked", dtype="F32")
    write_weights(stacked, tensors, "F32", 1)
    expected, found = plans_of(single), plans_of(stacked)
    assert found.keys() == expected.keys()
    for name, plan in expected.items():
        np.testing.assert_array_equal(values_of(found[name]), values_of(plan))


@pytest.mark.parametrize("prefix", ["backbone.", "model."])
def test_both_prefixes_are_understood(prefix: str, tmp_path: Path) -> None:
    plans = plans_of(write_source_model(tmp_path, prefix=prefix))
    assert plans["blk.0.ssm_in.weight"].parts[0].name == f"{prefix}layers.0.mixer.in_proj.weight"


def test_router_bias_has_two_spellings(tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            if name.endswith("e_score_correction_bias"):
                new_name = name.replace("correction_bias", "correction.bias")
                tensors[new_name] = tensors.pop(name)

    plans = plans_of(write_source_model(tmp_path, edit=rename))
    assert plans["blk.1.exp_probs_b.bias"].parts[0].name.endswith("correction.bias")


def test_tied_embeddings_leave_the_output_out(tmp_path: Path) -> None:
    folder = write_source_model(tmp_path, config={"tie_word_embeddings": True})
    assert "output.weight" not in plans_of(folder)


@pytest.mark.parametrize("max_elements", [1, 96, 100, 97 * 96, 10**9])
def test_pieces_are_whole_rows_that_cover_the_tensor_once(
    max_elements: int, tmp_path: Path
) -> None:
    plans = plans_of(write_source_model(tmp_path))
    for plan in plans.values():
        pieces = list(pieces_of(plan, max_elements))
        assert sum(piece.end - piece.first for piece in pieces) == plan.spec.n_elements
        for piece in pieces:
            n_elements = piece.end - piece.first
            assert piece.first % plan.spec.n_per_row == 0
            assert n_elements % plan.spec.n_per_row == 0
            assert n_elements <= max(max_elements, plan.spec.n_per_row)
    assert len(list(pieces_of(plans["blk.1.ffn_up_exps.weight"], 10**9))) == 4


def test_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    name = "backbone.layers.1.mixer.experts.2.down_proj.weight"

    def drop(tensors: Tensors) -> None:
        del tensors[name]

    message = refused(write_source_model(tmp_path, edit=drop))
    assert f"tensor {name!r}: expected shape [96, 64], found no such tensor" in message


def test_source_without_embeddings_is_refused(tmp_path: Path) -> None:
    def drop(tensors: Tensors) -> None:
        del tensors["backbone.embeddings.weight"]

    assert "'backbone.embeddings.weight'" in refused(write_source_model(tmp_path, edit=drop))


def test_tensor_that_no_layer_has_is_refused_by_name(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["mtp.layers.0.enorm.weight"] = np.ones(96, np.float32)

    assert "tensor 'mtp.layers.0.enorm.weight' is none" in refused(
        write_source_model(tmp_path, edit=add)
    )


def test_shape_that_contradicts_the_config_is_refused(tmp_path: Path) -> None:
    folder = write_source_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"moe_intermediate_size": 32})
    message = refused(folder)
    assert "model.safetensors: tensor 'backbone.layers.1.mixer.experts.0.up_proj.weight'" in message
    assert "expected shape [32, 96], found [64, 96]" in message


@pytest.mark.parametrize("dtype", ["I64", "F64"])
def test_wrong_dtype_is_refused(dtype: str, tmp_path: Path) -> None:
    message = refused(write_source_model(tmp_path, dtype=dtype))
    assert f"expected a dtype of BF16 F16 F32, found {dtype}" in message


def test_every_expert_is_a_part_of_its_own(tmp_path: Path) -> None:
    plans = plans_of(write_source_model(tmp_path))
    roles = (Role.EXPERT_UP, Role.EXPERT_DOWN)
    assert {len(p.parts) for p in plans.values() if p.spec.role in roles} == {4}
    assert {len(p.parts) for p in plans.values() if p.spec.role not in roles} == {1}
