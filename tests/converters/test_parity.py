"""The F32 GGUF in the engine computes what transformers computes from the source model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanorun_converters.convert import ConvertOptions, convert
from tests.converters.transformers_reference import (
    N_POSITIONS,
    engine_logits,
    mean_kl,
    reference_logits,
    save_random_model,
)
from tests.support.source_models import write_tokenizer

N_VOCAB = 352
COMMON = {"vocab_size": N_VOCAB, "conv_kernel": 4, "chunk_size": 64, "layer_norm_epsilon": 1e-5}

# No size is a multiple of 256; patterns, groups, experts and heads all differ.
CONFIGS: dict[str, dict[str, Any]] = {
    "moe": {
        "hybrid_override_pattern": "MEM*EME*",
        "hidden_size": 160, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 32,
        "mamba_num_heads": 6, "mamba_head_dim": 32, "n_groups": 3, "ssm_state_size": 48,
        "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
        "moe_shared_expert_intermediate_size": 224, "routed_scaling_factor": 2.5,
    },
    "moe with expert groups and latent experts": {
        "hybrid_override_pattern": "*EMME",
        "hidden_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "mamba_num_heads": 4, "mamba_head_dim": 64, "n_groups": 4, "ssm_state_size": 32,
        "n_routed_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 96, "moe_latent_size": 96,
        "n_group": 4, "topk_group": 2, "routed_scaling_factor": 5.0, "norm_topk_prob": False,
    },
    "dense": {
        "hybrid_override_pattern": "M-M*-M-",
        "hidden_size": 224, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32,
        "mamba_num_heads": 5, "mamba_head_dim": 64, "n_groups": 1, "ssm_state_size": 64,
        "intermediate_size": 352,
    },
}  # fmt: skip


def check_parity(source: Path, model: Any, folder: Path, n_vocab: int, first_token: int) -> None:
    out = folder / "model-f32.gguf"
    convert(source, ConvertOptions(out=out, recipe="f32"))
    tokens = np.random.default_rng(1).integers(first_token, n_vocab, N_POSITIONS).tolist()
    expected, found = reference_logits(model, tokens), engine_logits(out, tokens)
    assert mean_kl(expected, found) < 1e-6
    assert (expected.argmax(-1) == found.argmax(-1)).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_engine_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = save_random_model(source, COMMON | CONFIGS[name], seed=len(name))
    write_tokenizer(source, N_VOCAB)
    check_parity(source, model, tmp_path, N_VOCAB, first_token=0)


def test_parity_check_sees_a_small_difference(tmp_path: Path) -> None:
    """One matrix off by a percent must not pass: the limit is no loose one."""
    source = tmp_path / "source"
    model = save_random_model(source, COMMON | CONFIGS["moe"], seed=3)
    write_tokenizer(source, N_VOCAB)
    import torch

    with torch.no_grad():
        model.model.layers[0].mixer.out_proj.weight *= 1.01
    with pytest.raises(AssertionError):
        check_parity(source, model, tmp_path, N_VOCAB, first_token=0)


def test_bundled_model_computes_what_transformers_computes(
    pico_source: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import NemotronHForCausalLM

    model = NemotronHForCausalLM.from_pretrained(pico_source, dtype=torch.float32).eval()
    check_parity(pico_source, model, tmp_path, n_vocab=1024, first_token=32)
