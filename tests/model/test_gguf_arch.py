from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanorun.errors import ModelError
from nanorun.model.arch import HybridArch
from nanorun.model.gguf import GgufFile, read_gguf
from nanorun.model.gguf_arch import arch_from_gguf
from tests.model.known_archs import TINY_DENSE, TINY_LATENT_MTP, TINY_MOE, TINY_PUZZLE
from tests.support.builders import arch_tensors, gguf_metadata, write_gguf

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
