"""Nano and Super at their true sizes: planned from names alone, converted within bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest

from nanorun_converters.convert import ConvertOptions, convert
from nanorun_converters.family.tokenizer import read_vocabulary
from nanorun_converters.source.open import open_source
from tests.converters.family.test_config import NANO_CONFIG, SUPER_CONFIG
from tests.support.source_models import write_json, write_tokenizer
from tests.support.waiting import little_work

INDEX = "model.safetensors.index.json"
GIB = 2**30


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that the Hub's repository of such a config has."""
    n_embd, n_vocab = config["hidden_size"], config["vocab_size"]
    yield "backbone.embeddings.weight", (n_vocab, n_embd)
    for i, kind in enumerate(config["hybrid_override_pattern"]):
        layer = f"backbone.layers.{i}."
        yield f"{layer}norm.weight", (n_embd,)
        for name, shape in mixer_shapes(config, kind):
            yield f"{layer}mixer.{name}", shape
    yield "backbone.norm_f.weight", (n_embd,)
    yield "lm_head.weight", (n_vocab, n_embd)
    if config.get("num_nextn_predict_layers"):
        for i, kind in enumerate("*E"):
            yield f"mtp.layers.{i}.norm.weight", (n_embd,)
            for name, shape in mixer_shapes(config, kind):
                yield f"mtp.layers.{i}.mixer.{name}", shape
        for name in ("0.enorm", "0.hnorm", "1.final_layernorm"):
            yield f"mtp.layers.{name}.weight", (n_embd,)
        yield "mtp.layers.0.eh_proj.weight", (n_embd, 2 * n_embd)


def mixer_shapes(config: dict[str, Any], kind: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    n_embd = config["hidden_size"]
    if kind == "M":
        n_head = config["mamba_num_heads"]
        d_inner = n_head * config["mamba_head_dim"]
        n_channels = d_inner + 2 * config["n_groups"] * config["ssm_state_size"]
        yield "in_proj.weight", (d_inner + n_channels + n_head, n_embd)
        yield "conv1d.weight", (n_channels, 1, config["conv_kernel"])
        yield "conv1d.bias", (n_channels,)
        for name in ("A_log", "D", "dt_bias"):
            yield name, (n_head,)
        yield "norm.weight", (d_inner,)
        yield "out_proj.weight", (n_embd, d_inner)
    elif kind == "*":
        n_q = config["num_attention_heads"] * config["head_dim"]
        n_kv = config["num_key_value_heads"] * config["head_dim"]
        yield "q_proj.weight", (n_q, n_embd)
        yield "k_proj.weight", (n_kv, n_embd)
        yield "v_proj.weight", (n_kv, n_embd)
        yield "o_proj.weight", (n_embd, n_q)
    else:
        n_expert, width = config["n_routed_experts"], config["moe_intermediate_size"]
        shared, latent = (
            config["moe_shared_expert_intermediate_size"],
            config.get("moe_latent_size"),
        )
        n_in = latent or n_embd
        yield "gate.weight", (n_expert, n_embd)
        yield "gate.e_score_correction_bias", (n_expert,)
        for i in range(n_expert):
            yield f"experts.{i}.up_proj.weight", (width, n_in)
            yield f"experts.{i}.down_proj.weight", (n_in, width)
        yield "shared_experts.up_proj.weight", (shared, n_embd)
        yield "shared_experts.down_proj.weight", (n_embd, shared)
        if latent:
            yield "fc1_latent_proj.weight", (latent, n_embd)
            yield "fc2_latent_proj.weight", (n_embd, latent)


def write_index(folder: Path, config: dict[str, Any], n_shards: int) -> None:
    """All that there is of a model before its weights are fetched."""
    folder.mkdir()
    write_json(folder / "config.json", config)
    names = [name for name, _ in tensor_shapes(config)]
    file_of = {
        name: f"model-{i * n_shards // len(names) + 1:05}-of-{n_shards:05}.safetensors"
        for i, name in enumerate(names)
    }
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


def write_holes(folder: Path, config: dict[str, Any]) -> None:
    """The files of the index with true headers, and holes in the place of weights."""
    shapes = dict(tensor_shapes(config))
    file_of = json.loads((folder / INDEX).read_text())["weight_map"]
    for file in sorted(set(file_of.values())):
        directory, end = {}, 0
        for name in (name for name in shapes if file_of[name] == file):
            first, end = end, end + 2 * prod(shapes[name])
            offsets = [first, end]
            directory[name] = {
                "dtype": "BF16", "shape": list(shapes[name]), "data_offsets": offsets,
            }  # fmt: skip
        header = json.dumps(directory).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(8 + len(header) + end)


@pytest.mark.parametrize(
    ("config", "n_params", "n_shards", "recipe"),
    [
        (NANO_CONFIG, 31_577_940_288, 13, "q8_0"),
        # The trunk's published count and the head's.
        (SUPER_CONFIG, 120_668_707_840 + 2_950_000_000, 50, "q4_0"),
    ],
    ids=["nano", "super"],
)
def test_final_size_is_known_from_config_and_index_in_seconds(
    config: dict[str, Any], n_params: int, n_shards: int, recipe: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    write_index(folder, config, n_shards)
    options = ConvertOptions(out=tmp_path / "out.gguf", recipe=recipe, dry_run=True)
    with little_work(cpu_s=20):
        bare = convert(folder, options)
    assert bare.n_params == pytest.approx(n_params, rel=1e-3)
    write_tokenizer(folder, config["vocab_size"])
    planned = convert(folder, options)
    # What is said of a size without the tokenizer, but for the names of its keys.
    source = open_source(folder, needs_weights=False)
    vocabulary = read_vocabulary(source, config, config["vocab_size"])
    added = sum(12 + len(token.encode()) for token in vocabulary.tokens)
    added += sum(8 + len(merge.encode()) for merge in vocabulary.merges)
    added += sum(len(text.encode()) for text in vocabulary.chat_templates.values())
    added += len(vocabulary.json.encode())
    assert len(vocabulary.tokens) == config["vocab_size"]
    assert 0 < planned.bytes - bare.bytes - added < 1024
    write_holes(folder, config)
    # Headers say what the names let one expect, to the byte.
    assert convert(folder, options).bytes == planned.bytes > bare.bytes


MEASURE = """
import sys
from pathlib import Path
from nanorun_converters.convert import ConvertOptions, convert
options = ConvertOptions(out=Path(sys.argv[2]), recipe="mxfp4", n_threads=4, keep_mtp=False)
result = convert(Path(sys.argv[1]), options)
print(result.peak_rss_bytes, result.bytes)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("config", "most"), [(NANO_CONFIG, 2.5), (SUPER_CONFIG, 6.0)], ids=["nano", "super"]
)
def test_memory_is_bounded_at_the_true_shapes(
    config: dict[str, Any], most: float, tmp_path: Path
) -> None:
    few = config | {"hybrid_override_pattern": "ME*", "num_hidden_layers": 3}
    few |= {"num_nextn_predict_layers": 0}
    write_index(tmp_path / "model", few, 3)
    write_holes(tmp_path / "model", few)
    write_tokenizer(tmp_path / "model", few["vocab_size"])
    out = tmp_path / "out.gguf"
    predicted = convert(tmp_path / "model", ConvertOptions(out=out, recipe="mxfp4", dry_run=True))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, n_bytes = map(int, done.stdout.split())
    assert peak < most * GIB
    assert n_bytes == predicted.bytes == out.stat().st_size
    out.unlink()
