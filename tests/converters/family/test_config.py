"""config.json into a HybridArch: every spelling, and every field that must not be ignored."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from nanorun.errors import ModelError
from nanorun.model.arch import HybridArch, LayerKind, parse_pattern
from nanorun.model.tensor_roles import expected_tensors
from nanorun_converters.family.config import arch_from_config
from nanorun_converters.options import ConvertOptions
from tests.model.known_archs import LIGHTNING, NANO, NANO_4B, SUPER, SUPER_TRUNK
from tests.support.source_models import DEFAULT_SIZES, model_config

WHERE = "model/config.json"

NANO_CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    "bos_token_id": 1,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": 2,
    "expand": 2,
    "head_dim": 128,
    "hidden_dropout": 0.0,
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "initializer_range": 0.02,
    "intermediate_size": 1856,
    "layer_norm_epsilon": 1e-05,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 64,
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "max_position_embeddings": 262144,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_group": 1,
    "n_groups": 8,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 52,
    "num_key_value_heads": 2,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 1.0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "sliding_window": None,
    "ssm_state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, math.inf],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
    "vocab_size": 131072,
}
TINY = model_config("ME*E", DEFAULT_SIZES)


def arch_of(config: dict[str, Any]) -> HybridArch:
    return arch_from_config(config, WHERE)


def refused(config: dict[str, Any]) -> str:
    with pytest.raises(ModelError) as caught:
        arch_of(config)
    assert caught.value.message.startswith(f"{WHERE}: ")
    return caught.value.message


def test_nano_is_read_whole() -> None:
    assert arch_of(NANO_CONFIG) == NANO


def test_dense_model_with_the_other_head_spelling_is_read() -> None:
    config = NANO_CONFIG | {
        "hybrid_override_pattern": NANO_4B.pattern, "num_hidden_layers": 42, "hidden_size": 3136,
        "num_attention_heads": 40, "num_key_value_heads": 8, "attention_head_dim": 128,
        "mamba_num_heads": 96, "mamba_head_dim": 80, "intermediate_size": 12544,
    }  # fmt: skip
    for key in ("head_dim", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"):
        del config[key]
    assert arch_of(config) == NANO_4B


def test_both_spellings_of_the_kv_heads_must_agree() -> None:
    assert arch_of(NANO_CONFIG | {"num_query_groups": 2}) == NANO
    message = refused(NANO_CONFIG | {"num_query_groups": 8})
    assert "num_query_groups: expected 2, as num_key_value_heads says" in message


def test_dense_model_ignores_the_defaults_of_experts() -> None:
    """transformers saves them for every model, whatever its layers."""
    arch = arch_of(TINY | {"hybrid_override_pattern": "M-*-"})
    assert (arch.n_expert, arch.n_ff_exp, arch.n_ff, arch.name) == (0, 0, 160, "nemotron_h")


@pytest.mark.parametrize(
    "kinds",
    [
        ["mamba", "moe", "attention", "moe"],
        ["linear_attention", "moe", "full_attention", "moe"],
    ],
)
@pytest.mark.parametrize("name", ["layers_block_type", "layer_types"])
def test_list_of_layers_equals_the_pattern(kinds: list[str], name: str) -> None:
    config = {k: v for k, v in TINY.items() if k != "hybrid_override_pattern"}
    assert arch_of(config | {name: kinds}).layers == parse_pattern("ME*E")
    dense = [kind.replace("moe", "mlp") for kind in kinds]
    assert arch_of(config | {name: dense}).layers == parse_pattern("M-*-")


@pytest.mark.parametrize(
    ("n_ctx", "expected"), [(4096, 4096), (262_144, 1_048_576), (2_000_000, 2_000_000)]
)
def test_context_is_what_was_trained_not_what_is_capped(n_ctx: int, expected: int) -> None:
    assert arch_of(TINY | {"max_position_embeddings": n_ctx}).n_ctx_train == expected


@pytest.mark.parametrize(
    "limit", [[0.0, math.inf], [0, "Infinity"], [0.0, {"__float__": "Infinity"}]]
)
def test_every_spelling_of_no_clamp_is_accepted(limit: list[Any]) -> None:
    assert arch_of(TINY | {"time_step_limit": limit}) == arch_of(TINY)


UNSUPPORTED: dict[str, Any] = {
    "mlp_hidden_act": "silu",
    "mamba_hidden_act": "gelu",
    "hidden_act": "gelu",
    "attention_bias": True,
    "use_bias": True,
    "mlp_bias": True,
    "mamba_proj_bias": True,
    "use_conv_bias": False,
    "sliding_window": 4096,
    "time_step_limit": [0.001, 0.1],
    "architectures": ["LlamaForCausalLM"],
    "num_nextn_predict_layers": 2,
    # Fields that nobody has thought of yet.
    "attention_logit_softcapping": 30.0,
    "residual_multiplier": 0.5,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_field_that_changes_the_maths_is_refused_by_name(name: str) -> None:
    assert f": {name}: " in refused(TINY | {name: UNSUPPORTED[name]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_attn_implementation_autoset", True),
        ("attn_implementation", "eager"),
        ("unsloth_version", "2026.1.1"),
        ("unsloth_fixed", True),
        ("tokenizer_class", "PreTrainedTokenizerFast"),
        ("max_length", 20),
        ("top_p", 0.9),
        ("temperature", 0.7),
        ("do_sample", True),
        ("problem_type", "single_label_classification"),
        ("model_max_length", 4096),
        ("is_decoder", True),
        ("pretraining_tp", 1),
        ("_commit_hash", "0123456789abcdef"),
        ("finetuning_task", "chat"),
        ("gradient_checkpointing", True),
        ("num_labels", 2),
        ("trust_remote_code", True),
        ("repetition_penalty", 1.1),
        ("num_return_sequences", 1),
        ("typical_p", 1.0),
    ],
)
def test_bookkeeping_does_not_change_the_shape(name: str, value: Any) -> None:
    assert arch_of(NANO_CONFIG | {name: value}) == arch_of(NANO_CONFIG)


@pytest.mark.parametrize("off", [None, False, 0, 0.0, "", [], {}])
def test_unknown_field_that_is_off_is_accepted(off: Any) -> None:
    assert arch_of(TINY | {"attention_logit_softcapping": off}) == arch_of(TINY)


REQUIRED = [
    "architectures", "hybrid_override_pattern", "vocab_size", "hidden_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "conv_kernel", "mamba_num_heads", "mamba_head_dim",
    "ssm_state_size", "n_groups", "max_position_embeddings", "layer_norm_epsilon",
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
]  # fmt: skip


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_field_is_refused_by_name(name: str) -> None:
    message = refused({k: v for k, v in TINY.items() if k != name})
    assert f": {name}: " in message
    assert message.endswith("found no such field")


@pytest.mark.parametrize("name", [n for n in REQUIRED if n not in REQUIRED[:2]])
@pytest.mark.parametrize("value", ["many", -1, True, [1], 10**30, math.nan], ids=str)
def test_size_that_is_no_number_is_refused(name: str, value: Any) -> None:
    refused(TINY | {name: value})


CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "layers and pattern": {"num_hidden_layers": 5},
    "pattern and list": {"layers_block_type": ["mamba", "moe", "attention", "mamba"]},
    "two norms": {"norm_eps": 1e-6},
    "two head sizes": {"attention_head_dim": 64},
    "letter": {"hybrid_override_pattern": "MX*E"},
    "empty pattern": {"hybrid_override_pattern": ""},
    "pattern of another type": {"hybrid_override_pattern": 7},
    "unknown kind": {"layers_block_type": ["mamba", "moe", "attention", "rwkv"]},
    "kinds that are no text": {"layers_block_type": [1, 2, 3, 4]},
    "mlp and moe": {"hybrid_override_pattern": "ME*-"},
    "groups and heads": {"n_groups": 3},
    "more experts used than there are": {"num_experts_per_tok": 5},
    "no shared expert": {"n_shared_experts": 0},
    "heads of KV": {"num_key_value_heads": 2},
    "too many layers": {"hybrid_override_pattern": "M" * 600, "num_hidden_layers": 600},
    "flag that is no flag": {"norm_topk_prob": "yes"},
    "infinite scale": {"routed_scaling_factor": math.inf},
}


@pytest.mark.parametrize("fault", CONTRADICTIONS)
def test_contradiction_is_refused(fault: str) -> None:
    refused(TINY | CONTRADICTIONS[fault])


SUPER_CONFIG = NANO_CONFIG | {
    "hybrid_override_pattern": SUPER.pattern, "num_hidden_layers": 88, "hidden_size": 4096,
    "mamba_num_heads": 128, "n_routed_experts": 512, "num_experts_per_tok": 22,
    "moe_intermediate_size": 2688, "moe_shared_expert_intermediate_size": 5376,
    "moe_latent_size": 1024, "routed_scaling_factor": 5.0, "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E", "intermediate_size": 5376,
}  # fmt: skip
MTP_SPELLINGS: list[dict[str, Any]] = [
    {},
    {"mtp_hybrid_override_pattern": "*E"},
    {"mtp_layers_block_type": ["attention", "moe"]},
    {"mtp_layers_block_type": ["full_attention", "moe"]},
]


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in names}


def test_super_is_read_whole() -> None:
    assert arch_of(SUPER_CONFIG) == SUPER
    assert arch_from_config(SUPER_CONFIG, WHERE, keep_mtp=False) == SUPER_TRUNK


def test_lightning_is_read_whole() -> None:
    kinds = {"M": "mamba", "E": "moe", "*": "attention"}
    config = without(NANO_CONFIG, "hybrid_override_pattern") | {
        "layers_block_type": [kinds[letter] for letter in NANO.pattern],
        "num_nextn_predict_layers": 1,
        "mtp_layers_block_type": ["attention", "moe"],
        "max_position_embeddings": 1_048_576,
        "eos_token_id": [2, 11],
    }
    assert arch_of(config) == LIGHTNING


def test_ultra_has_the_published_number_of_parameters() -> None:
    attention = {7, 14, 23, 32, 39, 48, 57, 64, 73, 82, 89, 98}
    others = itertools.cycle(["mamba", "moe"])
    kinds = ["attention" if i in attention else next(others) for i in range(108)]
    config = without(SUPER_CONFIG, "hybrid_override_pattern", "mtp_hybrid_override_pattern") | {
        "layers_block_type": kinds, "num_hidden_layers": 108, "hidden_size": 8192,
        "num_attention_heads": 64, "mamba_num_heads": 256, "moe_intermediate_size": 5120,
        "moe_shared_expert_intermediate_size": 10240, "moe_latent_size": 2048,
        "mtp_layers_block_type": ["attention", "moe"],
    }  # fmt: skip
    arch = arch_from_config(config, WHERE, keep_mtp=False)
    counts = [arch.n_layers_of(kind) for kind in (LayerKind.SSM, LayerKind.MOE)]
    assert counts == [48, 48]
    n_params = sum(spec.n_elements for spec in expected_tensors(arch).values())
    assert n_params == pytest.approx(549.3e9, rel=1e-3)


@pytest.mark.parametrize("spelling", MTP_SPELLINGS)
def test_every_spelling_of_an_mtp_head_is_read(spelling: dict[str, Any]) -> None:
    arch = arch_of(TINY | {"num_nextn_predict_layers": 1} | spelling)
    assert arch.n_layer_nextn == 1


@pytest.mark.parametrize(
    "head",
    [
        {"num_nextn_predict_layers": 2},
        {"mtp_hybrid_override_pattern": "*E*E"},
        {"mtp_hybrid_override_pattern": "M"},
        {"mtp_layers_block_type": ["moe", "attention"]},
        {"mtp_layers_block_type": 7},
        {"mtp_layers_block_type": [["attention"], {}]},
    ],
)
def test_mtp_head_of_another_form_is_refused_unless_it_is_left_out(head: dict[str, Any]) -> None:
    config = TINY | {"num_nextn_predict_layers": 1} | head
    with pytest.raises(ModelError, match="num_nextn_predict_layers") as caught:
        arch_from_config(config, WHERE, again=ConvertOptions(recipe="q4").again("SRC"))
    assert caught.value.tries == ("nanorun convert SRC --recipe q4 --no-mtp",)
    assert arch_from_config(config, WHERE, keep_mtp=False).n_layer_nextn == 0


PUZZLE: dict[str, Any] = TINY | {
    "architectures": ["NemotronHPuzzleForCausalLM"],
    "model_type": "nemotron_h_puzzle",
    "num_hidden_layers": None,
    "hybrid_override_pattern": None,
    "layers_block_type": ["mamba", "moe"],
    "block_configs": [
        {"block_type": "mamba"},
        {"block_type": "moe", "moe_intermediate_size": 96, "num_experts_per_tok": 3},
        {"block_type": "attention", "moe_intermediate_size": None},
        {"block_type": "moe", "moe_intermediate_size": 64, "num_experts_per_tok": 2},
    ],
}


def puzzle_with(i_layer: int, **fields: Any) -> dict[str, Any]:
    blocks = [dict(block) for block in PUZZLE["block_configs"]]
    blocks[i_layer] |= fields
    return PUZZLE | {"block_configs": blocks}


def test_puzzle_has_sizes_of_its_own_in_each_layer() -> None:
    arch = arch_of(PUZZLE)
    assert arch.pattern == "ME*E"
    assert [arch.n_ff_exp_at(i) for i in (1, 3)] == [96, 64]
    assert [arch.n_expert_used_at(i) for i in (1, 3)] == [3, 2]
    assert arch.n_ff_exp_per_layer == (0, 96, 0, 64)


def test_puzzle_of_equal_layers_is_a_plain_model() -> None:
    arch = arch_of(puzzle_with(1, moe_intermediate_size=64, num_experts_per_tok=2))
    assert arch == arch_of(TINY)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (without(PUZZLE, "block_configs"), "block_configs: expected"),
        (PUZZLE | {"block_configs": []}, "block_configs: expected"),
        (PUZZLE | {"block_configs": [1, 2]}, "block_configs[0]: expected an object"),
        (PUZZLE | {"num_hidden_layers": 5}, "num_hidden_layers: expected 4"),
        (puzzle_with(0, block_type="rwkv"), "block_configs: layer 0"),
        (puzzle_with(1, moe_intermediate_size=None), "block_configs[1]: moe_intermediate_size"),
        (puzzle_with(1, n_routed_experts=64), "block_configs[1]: n_routed_experts"),
    ],
)
def test_puzzle_that_cannot_be_read_is_refused(config: dict[str, Any], message: str) -> None:
    assert message in refused(config)


def test_puzzle_with_an_mtp_head_is_refused_unless_it_is_left_out() -> None:
    config = PUZZLE | {"num_nextn_predict_layers": 1, "mtp_block_configs": [{"block_type": "moe"}]}
    assert "MTP head of a Puzzle" in refused(config)
    assert arch_from_config(config, WHERE, keep_mtp=False) == arch_of(PUZZLE)


def test_text_part_of_a_larger_model_is_read() -> None:
    larger = {
        "architectures": ["NemotronH_Nano_Omni"], "vision_config": {"depth": 4},
        "llm_config": TINY,
    }  # fmt: skip
    assert arch_of(larger) == arch_of(TINY)
    assert arch_of(larger | {"llm_config": without(TINY, "architectures")}) == arch_of(TINY)
    assert "llm_config: vocab_size" in refused(larger | {"llm_config": without(TINY, "vocab_size")})
