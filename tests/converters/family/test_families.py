"""Every family of models: found whole, loaded and run by the engine, MTP head included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanorun.errors import ModelError
from nanorun.model.gguf import read_gguf
from nanorun.model.gguf_arch import arch_from_gguf
from nanorun.model.tensor_roles import check_tensors
from nanorun_converters.convert import ConvertOptions, convert
from nanorun_converters.family.config import arch_from_config
from tests.converters.mtp_reference import add_random_head, engine_head_logits, head_logits
from tests.converters.test_parity import COMMON, CONFIGS, N_VOCAB, check_parity
from tests.converters.transformers_reference import engine_logits, mean_kl, save_random_model
from tests.support.source_models import Tensors, write_json, write_source_model, write_tokenizer

BLOCKS: list[dict[str, Any]] = [
    {},
    {"moe_intermediate_size": 96, "num_experts_per_tok": 3},
    {},
    {"moe_intermediate_size": 64, "num_experts_per_tok": 2},
]
FAMILIES: dict[str, dict[str, Any]] = {
    "nano": {},
    "dense": {"pattern": "M-*-"},
    "lightning": {"mtp": True},
    "super": {"mtp": True, "moe_latent_size": 32, "n_shards": 3},
    "puzzle": {"blocks": BLOCKS, "moe_latent_size": 32, "ssm_state_size": 48, "prefix": "model."},
}
TOKENS = list(range(32, 64))


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_whole_and_the_engine_runs_it(family: str, tmp_path: Path) -> None:
    source = write_source_model(tmp_path / "source", **FAMILIES[family])
    out = tmp_path / "model.gguf"
    convert(source, ConvertOptions(out=out))
    gguf = read_gguf(out)
    arch = arch_from_gguf(gguf)
    check_tensors(gguf, arch)
    assert arch == arch_from_config(json.loads((source / "config.json").read_text()), "config.json")
    logits = engine_logits(out, TOKENS)
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1
    if arch.n_layer_nextn:
        logits = engine_head_logits(out, TOKENS)
        assert np.isfinite(logits).all()
        assert logits.std() > 0.1


@pytest.mark.parametrize("name", [name for name in CONFIGS if "moe" in name])
def test_mtp_head_in_the_engine_computes_what_torch_computes(name: str, tmp_path: Path) -> None:
    config = COMMON | CONFIGS[name]
    model = save_random_model(tmp_path / "source", config, seed=7)
    parts = add_random_head(tmp_path / "source", config, seed=8)
    saved = json.loads((tmp_path / "source" / "config.json").read_text())
    write_json(tmp_path / "source" / "config.json", saved | {"num_nextn_predict_layers": 1})
    write_tokenizer(tmp_path / "source", N_VOCAB)
    check_parity(tmp_path / "source", model, tmp_path, N_VOCAB, first_token=0)
    tokens = np.random.default_rng(2).integers(0, N_VOCAB, 64).tolist()
    expected = head_logits(model, parts, tokens)
    found = engine_head_logits(tmp_path / "model-f32.gguf", tokens)
    assert mean_kl(expected, found) < 1e-6
    assert (expected.argmax(-1) == found.argmax(-1)).all()


def test_no_mtp_leaves_the_head_out_and_nothing_else(tmp_path: Path) -> None:
    with_head = write_source_model(tmp_path / "with", mtp=True)
    for name, keep_mtp in (("head", True), ("trunk", False)):
        out = tmp_path / f"{name}.gguf"
        convert(with_head, ConvertOptions(out=out, recipe="f32", keep_mtp=keep_mtp))
    head, trunk = read_gguf(tmp_path / "head.gguf"), read_gguf(tmp_path / "trunk.gguf")
    dropped = head.tensors.keys() - trunk.tensors.keys()
    assert dropped == {name for name in head.tensors if name.startswith("blk.4.")}
    assert arch_from_gguf(trunk).n_layer_nextn == 0
    found = engine_logits(tmp_path / "trunk.gguf", TOKENS)
    np.testing.assert_array_equal(found, engine_logits(tmp_path / "head.gguf", TOKENS))


def test_head_that_the_config_does_not_mention_is_refused(tmp_path: Path) -> None:
    source = write_source_model(
        tmp_path / "source", mtp=True, config={"num_nextn_predict_layers": 0}
    )
    with pytest.raises(ModelError, match=r"tensor 'mtp\.layers\.0"):
        convert(source, ConvertOptions(out=tmp_path / "out.gguf"))


@pytest.mark.parametrize("prefix", ["backbone.", "model.", "language_model.backbone."])
def test_prefix_of_the_names_does_not_change_the_file(prefix: str, tmp_path: Path) -> None:
    data = []
    for name in ("backbone.", prefix):
        source = write_source_model(tmp_path / name, prefix=name, mtp=True)
        convert(source, ConvertOptions(out=tmp_path / "out.gguf", force=True))
        gguf = read_gguf(tmp_path / "out.gguf")
        data.append(gguf.path.read_bytes()[gguf.data_offset :])
    assert data[0] == data[1]


def test_text_part_of_a_larger_model_is_converted(tmp_path: Path) -> None:
    def add_eyes(tensors: Tensors) -> None:
        tensors["vision_model.patch.weight"] = np.ones((4, 4), np.float32)

    source = write_source_model(
        tmp_path / "source", prefix="language_model.backbone.", edit=add_eyes
    )
    text = json.loads((source / "config.json").read_text())
    whole = {"architectures": ["NemotronH_Omni"], "vision_config": {}, "llm_config": text}
    write_json(source / "config.json", whole)
    convert(source, ConvertOptions(out=tmp_path / "out.gguf"))
    gguf = read_gguf(tmp_path / "out.gguf")
    check_tensors(gguf, arch_from_gguf(gguf))
    assert gguf.metadata["tokenizer.ggml.eos_token_id"] == 11


def test_tensor_that_only_looks_like_a_part_beside_the_text_is_refused(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["vision_model.patch.weight"] = np.ones((4, 4), np.float32)

    source = write_source_model(tmp_path / "source", edit=add)
    with pytest.raises(ModelError, match=r"vision_model\.patch"):
        convert(source, ConvertOptions(out=tmp_path / "out.gguf"))
