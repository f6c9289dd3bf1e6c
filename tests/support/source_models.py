"""Random tiny source models, written without the code under test."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]

# The pre-tokenizer of Mistral's tekken, which Nemotron's vocabulary descends from.
TEKKEN_REGEX = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Ids as Nemotron 3 has them.
SPECIAL_TOKENS = {
    0: "<unk>", 1: "<s>", 2: "</s>", 10: "<|im_start|>", 11: "<|im_end|>",
    12: "<think>", 13: "</think>", 14: "<tool_call>", 15: "</tool_call>",
}  # fmt: skip
N_SPECIAL = 32
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
DEFAULT_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 96,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "intermediate_size": 160,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 128,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
}


def write_source_model(
    folder: Path,
    *,
    pattern: str = "ME*E",
    dtype: str = "BF16",
    n_shards: int = 1,
    stacked_experts: bool = False,
    prefix: str = "backbone.",
    mtp: bool = False,
    blocks: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
    config: Mapping[str, Any] = {},
    edit: Callable[[Tensors], None] | None = None,
    **sizes: int,
) -> Path:
    """Write a source model as the Hub holds one: config, tokenizer, template, weights.

    Args:
        folder: Where; made if need be.
        pattern: Layers as letters.
        dtype: Of every tensor, as safetensors spells it.
        n_shards: Files of weights; with more than one there is an index.
        stacked_experts: One tensor for the experts of a layer, as transformers 5 saves them.
        prefix: Of the trunk's names.
        mtp: Whether there is a multi-token prediction head, as Lightning and Super have.
        blocks: Puzzle's `block_configs`: the sizes of each layer's experts.
        seed: Of the random weights.
        config: Fields to set in config.json; None removes one.
        edit: Called with the tensors (float32) before they are written.
        **sizes: Fields of `DEFAULT_SIZES` to change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = model_config(pattern, {**DEFAULT_SIZES, **sizes}, dtype)
    if blocks:
        fields |= puzzle_fields(pattern, blocks)
    rng = np.random.default_rng(seed)
    tensors = random_tensors(pattern, fields, prefix, stacked_experts, rng)
    if mtp:
        fields |= {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
        add_mtp_head(tensors, fields, prefix, stacked_experts, rng)
    if edit is not None:
        edit(tensors)
    fields |= config
    write_json(folder / "config.json", {k: v for k, v in fields.items() if v is not None})
    write_tokenizer(folder, fields["vocab_size"])
    write_weights(folder, tensors, dtype, n_shards)
    return folder


def model_config(pattern: str, sizes: Mapping[str, Any], dtype: str = "BF16") -> dict[str, Any]:
    """A config.json in NVIDIA's form."""
    torch_dtype = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}.get(dtype, dtype)
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": len(pattern),
        **sizes,
        "max_position_embeddings": 4096,
        "layer_norm_epsilon": 1e-5,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "use_conv_bias": True,
        "use_bias": False,
        "mlp_bias": False,
        "attention_bias": False,
        "mamba_proj_bias": False,
        "residual_in_fp32": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "time_step_min": 0.0,
        "torch_dtype": torch_dtype,
    }


def puzzle_fields(pattern: str, blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a Puzzle model's config.json says otherwise."""
    kinds = {"M": "mamba", "E": "moe", "*": "attention"}
    return {
        "architectures": ["NemotronHPuzzleForCausalLM"],
        "model_type": "nemotron_h_puzzle",
        "num_hidden_layers": None,
        "hybrid_override_pattern": None,
        "block_configs": [
            {"block_type": kinds[letter], **block}
            for letter, block in zip(pattern, blocks, strict=True)
        ],
    }


def add_mtp_head(
    tensors: Tensors,
    config: Mapping[str, Any],
    prefix: str,
    stacked: bool,
    rng: np.random.Generator,
) -> None:
    """The tensors of a multi-token prediction head: an attention and a MoE layer."""
    n_embd = config["hidden_size"]
    head = random_tensors("*E", config, "", stacked, rng)
    # Beside the trunk, whatever that is called: `language_model.backbone.` has a neighbour too.
    mtp = _root(prefix) + "mtp."
    for name, values in head.items():
        if name.startswith("layers."):
            tensors[mtp + name] = values
    fused = rng.standard_normal((n_embd, 2 * n_embd), dtype=np.float32)
    tensors[f"{mtp}layers.0.eh_proj.weight"] = fused / np.float32(np.sqrt(2 * n_embd))
    for name in ("0.enorm", "0.hnorm", "1.final_layernorm"):
        tensors[f"{mtp}layers.{name}.weight"] = _norm(rng, n_embd)


def random_tensors(
    pattern: str,
    config: Mapping[str, Any],
    prefix: str,
    stacked_experts: bool,
    rng: np.random.Generator,
) -> Tensors:
    """The tensors of a model, by name, in float32."""
    tensors: Tensors = {}
    n_embd, n_vocab = config["hidden_size"], config["vocab_size"]

    def matrix(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape, dtype=np.float32)
        tensors[prefix + name] = values / np.float32(np.sqrt(shape[-1]))

    matrix("embeddings.weight", n_vocab, n_embd)
    for i, kind in enumerate(pattern):
        layer = f"layers.{i}."
        tensors[f"{prefix}{layer}norm.weight"] = _norm(rng, n_embd)
        mixer = f"{layer}mixer."
        if kind == "M":
            _add_ssm(tensors, matrix, prefix, mixer, config, rng)
        elif kind == "*":
            n_head, head = config["num_attention_heads"], config["head_dim"]
            n_kv = config["num_key_value_heads"] * head
            matrix(f"{mixer}q_proj.weight", n_head * head, n_embd)
            matrix(f"{mixer}k_proj.weight", n_kv, n_embd)
            matrix(f"{mixer}v_proj.weight", n_kv, n_embd)
            matrix(f"{mixer}o_proj.weight", n_embd, n_head * head)
        elif kind == "-":
            matrix(f"{mixer}up_proj.weight", config["intermediate_size"], n_embd)
            matrix(f"{mixer}down_proj.weight", n_embd, config["intermediate_size"])
        else:
            sizes = _with_block(config, i)
            _add_experts(tensors, matrix, prefix, mixer, sizes, stacked_experts, rng)
    tensors[f"{prefix}norm_f.weight"] = _norm(rng, n_embd)
    if not config.get("tie_word_embeddings"):
        head_weights = rng.standard_normal((n_vocab, n_embd), dtype=np.float32)
        tensors[f"{_root(prefix)}lm_head.weight"] = head_weights / np.float32(np.sqrt(n_embd))
    return tensors


def _root(prefix: str) -> str:
    """What the names beside the trunk start with: `language_model.`, or nothing."""
    return prefix[: -len("backbone.")] if prefix.endswith("backbone.") else ""


def _with_block(config: Mapping[str, Any], i_layer: int) -> Mapping[str, Any]:
    blocks = config.get("block_configs") or ()
    return {**config, **blocks[i_layer]} if i_layer < len(blocks) else config


def _norm(rng: np.random.Generator, size: int) -> np.ndarray:
    return 1 + 0.1 * rng.standard_normal(size, dtype=np.float32)


def _add_ssm(
    tensors: Tensors,
    matrix: Callable[..., None],
    prefix: str,
    mixer: str,
    config: Mapping[str, Any],
    rng: np.random.Generator,
) -> None:
    n_head = config["mamba_num_heads"]
    d_inner = n_head * config["mamba_head_dim"]
    n_channels = d_inner + 2 * config["n_groups"] * config["ssm_state_size"]
    matrix(f"{mixer}in_proj.weight", d_inner + n_channels + n_head, config["hidden_size"])
    matrix(f"{mixer}conv1d.weight", n_channels, 1, config["conv_kernel"])
    matrix(f"{mixer}out_proj.weight", config["hidden_size"], d_inner)
    small = {
        "conv1d.bias": 0.1 * rng.standard_normal(n_channels, dtype=np.float32),
        "A_log": np.log(rng.uniform(1, 16, n_head)).astype(np.float32),
        "D": _norm(rng, n_head),
        "dt_bias": rng.uniform(-4, 0, n_head).astype(np.float32),
        "norm.weight": _norm(rng, d_inner),
    }
    tensors.update({f"{prefix}{mixer}{name}": values for name, values in small.items()})


def _add_experts(
    tensors: Tensors,
    matrix: Callable[..., None],
    prefix: str,
    mixer: str,
    config: Mapping[str, Any],
    stacked: bool,
    rng: np.random.Generator,
) -> None:
    n_embd, n_expert = config["hidden_size"], config["n_routed_experts"]
    width, n_shared = config["moe_intermediate_size"], config["moe_shared_expert_intermediate_size"]
    n_in = config.get("moe_latent_size") or n_embd
    matrix(f"{mixer}gate.weight", n_expert, n_embd)
    bias = 0.05 * rng.standard_normal(n_expert, dtype=np.float32)
    tensors[f"{prefix}{mixer}gate.e_score_correction_bias"] = bias
    if config.get("moe_latent_size"):
        matrix(f"{mixer}fc1_latent_proj.weight", n_in, n_embd)
        matrix(f"{mixer}fc2_latent_proj.weight", n_embd, n_in)
    if stacked:
        matrix(f"{mixer}experts.up_proj", n_expert, width, n_in)
        matrix(f"{mixer}experts.down_proj", n_expert, n_in, width)
    else:
        for i in range(n_expert):
            matrix(f"{mixer}experts.{i}.up_proj.weight", width, n_in)
            matrix(f"{mixer}experts.{i}.down_proj.weight", n_in, width)
    matrix(f"{mixer}shared_experts.up_proj.weight", n_shared, n_embd)
    matrix(f"{mixer}shared_experts.down_proj.weight", n_embd, n_shared)


def write_weights(
    folder: Path, tensors: Mapping[str, np.ndarray], dtype: str, n_shards: int
) -> None:
    """Write tensors into one file, or into several and an index."""
    encoded = {
        name: (dtype, values.shape, encode(values, dtype)) for name, values in tensors.items()
    }
    if n_shards == 1:
        write_safetensors(folder / "model.safetensors", encoded)
        return
    names = list(encoded)
    file_of = {}
    for i in range(n_shards):
        file = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        shard = names[i * len(names) // n_shards : (i + 1) * len(names) // n_shards]
        write_safetensors(folder / file, {name: encoded[name] for name in shard})
        file_of |= dict.fromkeys(shard, file)
    total = sum(len(raw) for _, _, raw in encoded.values())
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    write_json(folder / "model.safetensors.index.json", index)


def encode(values: np.ndarray, dtype: str) -> bytes:
    """Numbers as safetensors holds them; bfloat16 rounds to nearest even."""
    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
        rounded[np.isnan(values)] = np.uint32(0x7FC00000)
        return (rounded >> 16).astype("<u2").tobytes()
    numpy_dtype = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "U8": "u1"}[dtype]
    return values.astype(numpy_dtype).tobytes()


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]
) -> None:
    """Write a safetensors file of (dtype, shape, data) by name."""
    directory: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, raw) in tensors.items():
        offsets = [end, end + len(raw)]
        directory[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        end += len(raw)
    write_raw_safetensors(path, directory, b"".join(raw for _, _, raw in tensors.values()))


def write_raw_safetensors(path: Path, directory: Any, data: bytes) -> None:
    """Write a safetensors file of any header, right or wrong."""
    header = directory if isinstance(directory, bytes) else json.dumps(directory).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def write_tokenizer(folder: Path, n_vocab: int, edit: Callable[[Any], None] | None = None) -> None:
    """Write a byte-level tokenizer: special tokens, 256 bytes, then merges of common letters."""
    alphabet = byte_alphabet()
    names = [SPECIAL_TOKENS.get(i, f"<SPECIAL_{i}>") for i in range(N_SPECIAL)]
    texts = [*names, *alphabet]
    merges = []
    for left in "etaoinshr":
        for right in "etaoinshr":
            if len(texts) < n_vocab:
                merges.append([left, right])
                texts.append(left + right)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **flags, "special": True} for i, name in enumerate(names)
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer(TEKKEN_REGEX),
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {text: i for i, text in enumerate(texts)},
            "merges": merges,
        },
    }  # fmt: skip
    if edit is not None:
        edit(tokenizer)
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(
        folder / "tokenizer_config.json",
        {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>",
         "add_bos_token": False, "add_eos_token": False,
         "tokenizer_class": "PreTrainedTokenizerFast"},
    )  # fmt: skip
    generation = {"bos_token_id": 1, "eos_token_id": [2, 11], "pad_token_id": 0}
    write_json(folder / "generation_config.json", generation)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def pre_tokenizer(regex: str) -> dict[str, Any]:
    """The form in which tokenizer.json states a regex that isolates words."""
    return {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": regex},
                "behavior": "Isolated",
                "invert": False,
            },
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            },
        ],
    }


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (256 + i for i in range(256))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
