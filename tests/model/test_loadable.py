"""Header values that would end the engine's process are refused by key and value.

By nanorun's reader alone: the engine must never see such a file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from nanorun.errors import ModelError
from nanorun.model.arch import HybridArch
from nanorun.model.gguf import read_gguf
from nanorun.model.gguf_arch import arch_from_gguf
from tests.model.known_archs import TINY_DENSE, TINY_MOE
from tests.support.builders import arch_tensors, gguf_metadata, write_gguf


def arch_of(folder: Path, arch: HybridArch, key: str, value: Any) -> HybridArch:
    prefix = "" if key.startswith("tokenizer.") else f"{arch.name}."
    metadata = gguf_metadata(arch) | {f"{prefix}{key}": value}
    path = write_gguf(folder / "m.gguf", metadata, arch_tensors(arch), with_data=False)
    return arch_from_gguf(read_gguf(path, check_data=False))


def tokens(arch: HybridArch, **changes: str) -> list[str]:
    texts = [f"token{i}" for i in range(arch.n_vocab)]
    for place, text in changes.items():
        texts[int(place[1:])] = text
    return texts


N_MOE = TINY_MOE.n_expert
# Of a layer that has no experts: the engine takes the largest of all.
USED = [N_MOE + 1 if kind == "M" else TINY_MOE.n_expert_used for kind in TINY_MOE.pattern]
REFUSED: list[tuple[HybridArch, str, Any, str]] = [
    (TINY_MOE, "expert_used_count", USED, f"at most expert_count {N_MOE}, found {N_MOE + 1}"),
    (TINY_DENSE, "expert_used_count", 2, "at most expert_count 0, found 2"),
    (TINY_DENSE, "expert_group_count", 1, "0 in a model without experts, found 1"),
    (TINY_MOE, "rope.scaling.type", "su", "one of none, linear, yarn, longrope, found 'su'"),
    (TINY_MOE, "attention.causal", False, "true, as of a model that writes text, found false"),
    (TINY_MOE, "pooling_type", 9, "0 to 4, found 9"),
    (TINY_MOE, "tokenizer.ggml.model", "rwkv", "one of gpt2, no_vocab, none, found 'rwkv'"),
    (
        TINY_MOE, "tokenizer.ggml.tokens", tokens(TINY_MOE, _3="token1"),
        "each token once, found 'token1' at 1 and 3",
    ),
    (
        TINY_MOE, "tokenizer.ggml.tokens", tokens(TINY_MOE, _3="", _5="[EMPTY_3]"),
        "each token once, found '[EMPTY_3]' at 3 and 5",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "key", "value", "problem"), REFUSED)
def test_value_that_the_engine_asserts_on_is_refused(
    arch: HybridArch, key: str, value: Any, problem: str, tmp_path: Path
) -> None:
    where = key if key.startswith("tokenizer.") else f"{arch.name}.{key}"
    with pytest.raises(ModelError, match=re.escape(f"key {where!r}: expected {problem}")):
        arch_of(tmp_path, arch, key, value)


@pytest.mark.parametrize(
    ("arch", "key", "value"),
    [
        (TINY_DENSE, "expert_used_count", 0),
        (TINY_DENSE, "expert_group_count", 0),
        (TINY_MOE, "expert_group_count", 0),
        (TINY_MOE, "rope.scaling.type", "yarn"),
        (TINY_MOE, "attention.causal", True),
        (TINY_MOE, "pooling_type", 0),
        (TINY_MOE, "tokenizer.ggml.model", "gpt2"),
        (TINY_MOE, "tokenizer.ggml.tokens", tokens(TINY_MOE, _3="")),
    ],
)
def test_value_that_the_engine_takes_is_taken(
    arch: HybridArch, key: str, value: Any, tmp_path: Path
) -> None:
    assert arch_of(tmp_path, arch, key, value) == arch
