"""Every tensor of every family equals what llama.cpp's own tools make, but for their faults.

Slow, and only where `NANORUN_LLAMA_CPP` names llama.cpp's sources; see docs/convert.md for the list
of differences and why each is one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import GgufFile, read_gguf
from nanorun_converters.convert import ConvertOptions, convert
from tests.converters.source.test_encodings import KEPT, all_linear
from tests.converters.test_byte_parity import FILE_TYPES
from tests.converters.upstream import VARIABLE, convert_with_llama, llama_cpp_folder
from tests.converters.upstream import quantize_with_llama as quantize
from tests.support.quantized_sources import (
    FP8_CHANNEL,
    FP8_MODELOPT,
    nvfp4_compressed,
    nvfp4_modelopt,
    write_quantized_model,
)
from tests.support.source_models import write_source_model

ROOT = llama_cpp_folder()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(ROOT is None, reason=f"{VARIABLE} names no llama.cpp"),
]

# Every row is a multiple of 256, so that llama_model_quantize falls back nowhere.
SIZES: dict[str, Any] = {
    "hidden_size": 256, "num_attention_heads": 8, "head_dim": 32, "mamba_num_heads": 8,
    "moe_intermediate_size": 256, "moe_shared_expert_intermediate_size": 512,
    "intermediate_size": 512, "n_routed_experts": 3,
}  # fmt: skip
# llama.cpp takes any model whose config knows of experts for one that has them.
NO_EXPERTS = dict.fromkeys(
    ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts",
     "moe_shared_expert_intermediate_size", "routed_scaling_factor", "norm_topk_prob", "n_group",
     "topk_group"]
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "nano": {},
    "dense": {"pattern": "M-*-", "config": NO_EXPERTS},
    "lightning": {"mtp": True},
    "super": {"mtp": True, "moe_latent_size": 256, "n_shards": 3},
    "puzzle": {
        "prefix": "model.", "moe_latent_size": 256,
        "blocks": [{}, {"moe_intermediate_size": 512, "num_experts_per_tok": 3}, {},
                   {"moe_intermediate_size": 256, "num_experts_per_tok": 2}],
    },
}  # fmt: skip
N_HEAD, N_HEAD_KV = 8, 1
# Those need an importance matrix there; test_byte_parity compares them with one.
NEED_IMATRIX = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")
TYPES = [type_ for type_ in FILE_TYPES if type_.label not in NEED_IMATRIX]


def upstream(source: Path, out: Path, outtype: str) -> Path:
    assert ROOT is not None
    return convert_with_llama(ROOT, source, out, outtype)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source model beside the F32 file that llama.cpp makes of it."""
    folder = tmp_path_factory.mktemp(request.param)
    source = write_source_model(folder / "source", dtype="F32", **SIZES | FAMILIES[request.param])
    upstream(source, folder / "upstream.gguf", "f32")
    return folder


def rows_of(gguf: GgufFile, name: str) -> tuple[GgmlType, np.ndarray]:
    tensor = gguf.tensors[name]
    raw = np.fromfile(gguf.path, np.uint8, tensor.n_bytes, offset=tensor.offset)
    return tensor.type, raw.reshape(-1, tensor.type.row_bytes(tensor.shape[-1]))


def unpermuted(name: str, rows: np.ndarray) -> np.ndarray:
    """Q and K with their rows in the source's order; llama.cpp pairs them up for RoPE."""
    found = re.search(r"attn_([qk])\.weight", name)
    if not found:
        return rows
    n_head = N_HEAD if found[1] == "q" else N_HEAD_KV
    pairs = rows.reshape(n_head, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def differences(theirs: Path, ours: Path) -> set[str]:
    expected, found = read_gguf(theirs), read_gguf(ours)
    names = expected.tensors.keys() ^ found.tensors.keys()
    for name in expected.tensors.keys() & found.tensors.keys():
        type_, rows = rows_of(expected, name)
        our_type, our_rows = rows_of(found, name)
        if expected.tensors[name].shape != found.tensors[name].shape or type_ is not our_type:
            names = {*names, f"{name} {type_.label} {our_type.label}"}
        elif name.endswith("ssm_a"):
            # -exp(A_log) is rounded once here, and twice there: the last bit may differ.
            if np.abs(rows.view("<i4") - our_rows.view("<i4")).max() > 1:
                names = {*names, name}
        elif not np.array_equal(unpermuted(name, rows), our_rows):
            names = {*names, name}
    return set(names)


def test_f32_tensors_equal_those_of_llama_cpp(family: Path) -> None:
    convert(family / "source", ConvertOptions(out=family / "f32.gguf", recipe="f32", force=True))
    found = differences(family / "upstream.gguf", family / "f32.gguf")
    assert found == set()


@pytest.mark.parametrize("type_", TYPES, ids=lambda type_: type_.label)
def test_quantized_tensors_equal_those_of_llama_cpp(type_: GgmlType, family: Path) -> None:
    theirs = quantize(family / "upstream.gguf", family / "theirs.gguf", FILE_TYPES[type_])
    options = ConvertOptions(
        out=family / "ours.gguf", recipe=type_.label, quantizer="ggml", pad="never", force=True
    )
    convert(family / "source", options)
    found = differences(theirs, family / "ours.gguf")
    assert found == set()


@pytest.mark.parametrize("outtype", ["bf16", "f16", "q8_0"])
@pytest.mark.parametrize("name", FAMILIES)
def test_direct_types_equal_those_of_llama_cpp(outtype: str, name: str, tmp_path: Path) -> None:
    source = write_source_model(tmp_path / "source", **SIZES | FAMILIES[name])
    theirs = upstream(source, tmp_path / "theirs.gguf", outtype)
    convert(source, ConvertOptions(out=tmp_path / "ours.gguf", recipe=outtype))
    found = differences(theirs, tmp_path / "ours.gguf")
    # The router of an MTP head is cut to the type there; everywhere else it is F32.
    known = {f"blk.4.ffn_gate_inp.weight {outtype} f32"} if FAMILIES[name].get("mtp") else set()
    assert found == known


@pytest.mark.parametrize(
    ("quantizer", "scheme"),
    [
        (nvfp4_modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        (nvfp4_compressed, {"quant_method": "compressed-tensors",
                            "format": "nvfp4-pack-quantized",
                            "config_groups": {"group_0": {"weights": {},
                                                          "input_activations": {}}}}),
    ],
    ids=["modelopt", "compressed-tensors"],
)  # fmt: skip
def test_nvfp4_equals_that_of_llama_cpp(quantizer: Any, scheme: Any, tmp_path: Path) -> None:
    source, _ = write_quantized_model(
        tmp_path / "source", all_linear(quantizer), scheme=scheme, **SIZES
    )
    theirs = upstream(source, tmp_path / "theirs.gguf", "f32")
    convert(source, ConvertOptions(out=tmp_path / "ours.gguf", recipe="f32", type_map=KEPT))
    found = differences(theirs, tmp_path / "ours.gguf")
    assert found == set()


@pytest.mark.parametrize(
    ("quantizer", "scheme"),
    [
        (FP8_MODELOPT, {"quant_method": "modelopt", "quant_algo": "FP8"}),
        (FP8_CHANNEL, {"quant_method": "compressed-tensors", "format": "float-quantized",
                       "config_groups": {"g": {"weights": {"strategy": "channel"}}}}),
    ],
    ids=["modelopt", "compressed-tensors"],
)  # fmt: skip
def test_fp8_equals_that_of_llama_cpp(quantizer: Any, scheme: Any, tmp_path: Path) -> None:
    def drop_inputs(stored: dict[str, Any]) -> None:
        if scheme["quant_method"] != "modelopt":
            for name in [name for name in stored if name.endswith(".input_scale")]:
                del stored[name]

    source, _ = write_quantized_model(
        tmp_path / "source", all_linear(quantizer), scheme=scheme, edit=drop_inputs, **SIZES
    )
    theirs = upstream(source, tmp_path / "theirs.gguf", "f32")
    convert(source, ConvertOptions(out=tmp_path / "ours.gguf", recipe="f32"))
    found = differences(theirs, tmp_path / "ours.gguf")
    assert found == set()
