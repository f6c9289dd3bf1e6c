"""The tensor list against llama.cpp's own loader: it takes what we call whole, refuses what not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from nanorun.model.arch import HybridArch
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import Role, expected_tensors, optional_tensors
from nanorun.runtime.llama.binding import load_llama
from tests.model.known_archs import TINY_DENSE, TINY_LATENT_MTP, TINY_MOE, TINY_PUZZLE
from tests.support.builders import Tensor, arch_tensors, gguf_metadata, write_gguf

ALL = [TINY_MOE, TINY_LATENT_MTP, TINY_PUZZLE, TINY_DENSE]

# Optional to the loader, and yet the model would be another without them.
LOADED_WITHOUT = ("ssm_conv1d.bias", "ffn_latent_down.weight", "ffn_latent_up.weight")


def engine_loads(path: Path, arch: HybridArch, tensors: Iterable[Tensor]) -> bool:
    llama = load_llama()
    kv = gguf_metadata(arch)
    kv["tokenizer.ggml.model"] = "no_vocab"
    kv[f"{arch.name}.vocab_size"] = len(kv.pop("tokenizer.ggml.tokens"))
    write_gguf(path / "m.gguf", kv, tensors)
    params = llama.llama_model_default_params()
    params.load_mtp = True
    params.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(path / "m.gguf").encode(), params)
    if model:
        llama.llama_model_free(model)
    return bool(model)


@pytest.mark.parametrize("arch", ALL)
def test_engine_loads_the_expected_tensors(arch: HybridArch, tmp_path: Path) -> None:
    assert engine_loads(tmp_path, arch, arch_tensors(arch))


@pytest.mark.parametrize("arch", ALL)
def test_engine_loads_the_optional_tensors(arch: HybridArch, tmp_path: Path) -> None:
    optional = [
        Tensor(spec.name, GgmlType.F32, spec.shape)
        for spec in optional_tensors(arch).values()
        if not spec.name.startswith("output.")
    ]
    assert engine_loads(tmp_path, arch, [*arch_tensors(arch), *optional])


@pytest.mark.parametrize("arch", ALL)
def test_engine_loads_nothing_more(arch: HybridArch, tmp_path: Path) -> None:
    extra = Tensor("blk.0.ffn_gate.weight", GgmlType.F32, (arch.n_embd, arch.n_embd))
    assert not engine_loads(tmp_path, arch, [*arch_tensors(arch), extra])


def test_engine_takes_factors_of_an_nvfp4_output_only(tmp_path: Path) -> None:
    factor = Tensor("output.scale", GgmlType.F32, (1,))
    tensors = arch_tensors(TINY_MOE)
    assert not engine_loads(tmp_path, TINY_MOE, [*tensors, factor])
    tensors[-1] = replace(tensors[-1], type=GgmlType.NVFP4)
    assert engine_loads(tmp_path, TINY_MOE, [*tensors, factor])


@pytest.mark.parametrize("arch", [TINY_MOE, TINY_LATENT_MTP, TINY_DENSE])
def test_engine_needs_each_kind_of_tensor(arch: HybridArch, tmp_path: Path) -> None:
    tensors = arch_tensors(arch)
    # One of each name apart from its block, in the last block that has it.
    specs = expected_tensors(arch).values()
    by_suffix = {re.sub(r"^blk\.\d+\.", "", spec.name): spec for spec in specs}
    for suffix, spec in by_suffix.items():
        # Without an output the engine takes the embedding: another model, but a valid one.
        if suffix in LOADED_WITHOUT or spec.role is Role.OUTPUT:
            continue
        rest = [t for t in tensors if t.name != spec.name]
        assert not engine_loads(tmp_path, arch, rest), spec.name
