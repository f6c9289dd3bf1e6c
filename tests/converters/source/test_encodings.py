"""FP8 and NVFP4 sources: decoded to the last bit, repacked to the last bit, no scale lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanorun.errors import ModelError, UsageError
from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import GgufFile, read_gguf
from nanorun.model.gguf_arch import arch_from_gguf
from nanorun.model.tensor_roles import check_tensors
from nanorun_converters.convert import ConvertOptions, convert
from nanorun_converters.source.encodings import FP8_VALUES
from nanorun_quant.ggml import load_ggml
from tests.converters.mtp_reference import engine_head_logits
from tests.converters.transformers_reference import engine_logits, mean_kl
from tests.support.quantized_sources import (
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_MODELOPT,
    Quantizer,
    Stored,
    float8,
    nvfp4_compressed,
    nvfp4_modelopt,
    write_quantized_model,
)
from tests.support.source_models import write_source_model

# Rows of 64, so that NVFP4's blocks fit, and more than 128, so that FP8's do not come out even.
SIZES: dict[str, Any] = {
    "pattern": "ME*", "hidden_size": 192, "num_attention_heads": 4, "mamba_num_heads": 4,
    "moe_intermediate_size": 64, "n_routed_experts": 3, "vocab_size": 320,
}  # fmt: skip
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
LINEAR = ("up_proj.weight", "down_proj.weight", "in_proj.weight", "out_proj.weight",
          "q_proj.weight", "o_proj.weight")  # fmt: skip
NVFP4_ALL = ["expert_up", "expert_down", "shared_up", "shared_down", "ssm_in", "ssm_out",
             "attn_q", "attn_out"]  # fmt: skip
KEPT = dict.fromkeys(NVFP4_ALL, "nvfp4")


def all_linear(quantizer: Quantizer) -> Callable[[str], Quantizer | None]:
    return lambda name: quantizer if name.endswith(LINEAR) else None


def mixed(name: str) -> Quantizer | None:
    """As in Super: experts NVFP4, the SSM's projections FP8, the rest as it was."""
    if ".experts." in name:
        return nvfp4_modelopt
    return FP8_MODELOPT if name.endswith(("in_proj.weight", "out_proj.weight")) else None


def tensor_data(gguf: GgufFile, name: str) -> np.ndarray:
    tensor = gguf.tensors[name]
    raw = np.fromfile(gguf.path, np.uint8, tensor.n_bytes, offset=tensor.offset)
    decoded = load_ggml().dequantize(raw, tensor.type, tensor.shape[-1])
    return decoded.reshape(tensor.shape)


@pytest.mark.parametrize(("dtype", "n_mantissa"), [("F8_E4M3", 3), ("F8_E5M2", 2)])
def test_values_of_fp8_codes_are_those_of_torch(dtype: str, n_mantissa: int) -> None:
    torch = pytest.importorskip("torch")
    torch_dtype = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype]
    expected = torch.arange(256, dtype=torch.uint8).view(torch_dtype).float().numpy()
    np.testing.assert_array_equal(FP8_VALUES[dtype], expected)
    finite = np.flatnonzero(np.isfinite(expected))
    assert [float8(code, n_mantissa) for code in finite] == expected[finite].tolist()


@pytest.mark.parametrize(
    ("quantizer_of", "scheme"),
    [
        (all_linear(FP8_MODELOPT), {"quant_method": "modelopt", "quant_algo": "FP8"}),
        (all_linear(FP8_CHANNEL), {"quant_method": "compressed-tensors"}),
        (all_linear(FP8_BLOCK), {"quant_method": "compressed-tensors"}),
        (all_linear(nvfp4_modelopt), MODELOPT),
        (all_linear(nvfp4_compressed), COMPRESSED),
        (mixed, {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}),
    ],
    ids=["fp8", "fp8 a row", "fp8 a block", "nvfp4", "nvfp4 compressed", "mixed"],
)
def test_weights_are_decoded_to_the_last_bit(
    quantizer_of: Callable[[str], Quantizer | None], scheme: Any, tmp_path: Path
) -> None:
    source, decoded = write_quantized_model(tmp_path, quantizer_of, scheme=scheme, **SIZES)
    out = tmp_path / "out.gguf"
    convert(source, ConvertOptions(out=out, recipe="f32", n_threads=2))
    gguf = read_gguf(out)
    mixer = "backbone.layers.{}.mixer."
    experts = [decoded[f"{mixer.format(1)}experts.{i}.down_proj.weight"] for i in range(3)]
    expected = {
        "blk.0.ssm_in.weight": decoded[f"{mixer.format(0)}in_proj.weight"],
        "blk.1.ffn_up_shexp.weight": decoded[f"{mixer.format(1)}shared_experts.up_proj.weight"],
        "blk.1.ffn_down_exps.weight": np.stack(experts),
        "blk.2.attn_q.weight": decoded[f"{mixer.format(2)}q_proj.weight"],
        "output.weight": decoded["lm_head.weight"],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(tensor_data(gguf, name), values, err_msg=name)


@pytest.mark.parametrize("quantizer", [nvfp4_modelopt, nvfp4_compressed])
def test_nvfp4_that_stays_is_moved_bit_for_bit_with_its_factors(
    quantizer: Quantizer, tmp_path: Path
) -> None:
    source, decoded = write_quantized_model(tmp_path, all_linear(quantizer), **SIZES)
    out = tmp_path / "out.gguf"
    result = convert(source, ConvertOptions(out=out, recipe="q8_0", type_map=KEPT))
    gguf = read_gguf(out)
    check_tensors(gguf, arch_from_gguf(gguf))
    assert result.types["nvfp4"] == 8
    names = {
        "blk.0.ssm_in": "backbone.layers.0.mixer.in_proj.weight",
        "blk.0.ssm_out": "backbone.layers.0.mixer.out_proj.weight",
        "blk.1.ffn_up_shexp": "backbone.layers.1.mixer.shared_experts.up_proj.weight",
        "blk.2.attn_output": "backbone.layers.2.mixer.o_proj.weight",
    }
    for stem, name in names.items():
        factor = tensor_data(gguf, f"{stem}.scale").astype(np.float64)
        # ggml's decoder gives the exact product of code and block scale.
        product = tensor_data(gguf, f"{stem}.weight") * factor
        np.testing.assert_allclose(product, decoded[name], rtol=1.2e-7, err_msg=name)
        assert tensor_data(gguf, f"{stem}.input_scale")[0] == pytest.approx(0.01)
    factors = tensor_data(gguf, "blk.1.ffn_up_exps.scale").astype(np.float64)
    stack = tensor_data(gguf, "blk.1.ffn_up_exps.weight") * factors[:, None, None]
    for i in range(3):
        expected = decoded[f"backbone.layers.1.mixer.experts.{i}.up_proj.weight"]
        np.testing.assert_allclose(stack[i], expected, rtol=1.2e-7)


def test_engine_computes_the_same_from_nvfp4_as_from_its_numbers(tmp_path: Path) -> None:
    """The factors are in force: the logits are those of the decoded weights."""
    source, _ = write_quantized_model(
        tmp_path / "source", all_linear(nvfp4_modelopt), **SIZES | {"pattern": "ME*E"}
    )
    outs = [tmp_path / "kept.gguf", tmp_path / "f32.gguf"]
    convert(source, ConvertOptions(out=outs[0], recipe="f32", type_map=KEPT))
    convert(source, ConvertOptions(out=outs[1], recipe="f32"))
    tokens = list(range(32, 96))
    kept, plain = (engine_logits(out, tokens) for out in outs)
    assert plain.std() > 0.1
    # The engine rounds activations to 8 bits before it multiplies them with NVFP4.
    assert mean_kl(plain, kept) < 1e-2


def test_mtp_head_cannot_stay_nvfp4_because_no_engine_would_load_the_file(tmp_path: Path) -> None:
    def head(name: str) -> Quantizer | None:
        return nvfp4_modelopt if name.startswith("mtp.") and name.endswith(LINEAR) else None

    source, _ = write_quantized_model(tmp_path / "source", head, mtp=True, **SIZES)
    out = tmp_path / "out.gguf"
    with pytest.raises(UsageError, match="no factor of an MTP head") as caught:
        convert(source, ConvertOptions(out=out, type_map=KEPT))
    assert caught.value.tries[0].startswith(f"nanorun convert {source} --no-mtp --out {out} ")
    convert(source, ConvertOptions(out=out, recipe="f32", n_threads=2))
    assert np.isfinite(engine_head_logits(out, list(range(32, 64)))).all()


def test_latent_projection_cannot_stay_nvfp4_because_its_factor_would_be_lost(
    tmp_path: Path,
) -> None:
    def latent(name: str) -> Quantizer | None:
        return nvfp4_modelopt if "latent" in name else None

    source, _ = write_quantized_model(tmp_path / "source", latent, moe_latent_size=64, **SIZES)
    options = ConvertOptions(out=tmp_path / "out.gguf", type_map={"latent_down": "nvfp4"})
    with pytest.raises(UsageError, match="reads no factor for latent_down") as caught:
        convert(source, options)
    assert caught.value.tries[0].startswith(f"nanorun convert {tmp_path / 'source'}")
    convert(source, ConvertOptions(out=tmp_path / "out.gguf"))


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}, 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 0),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
          "quantized_layers": {"backbone.layers.0.mixer.in_proj": {"quant_algo": "W4A16_NVFP4"},
                               "backbone.layers.2.mixer": {"quant_algo": "NVFP4"}}}, 1),
    ],
)  # fmt: skip
def test_weights_quantized_alone_ask_for_full_activations(
    scheme: Any, expected: int, tmp_path: Path
) -> None:
    source, _ = write_quantized_model(tmp_path, all_linear(nvfp4_modelopt), scheme=scheme, **SIZES)
    convert(source, ConvertOptions(out=tmp_path / "out.gguf", type_map=KEPT))
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    names = metadata.get("general.tensor_extra.name", [])
    assert len(names) == expected
    assert metadata.get("general.tensor_extra.prec_a4", []) == [False] * expected
    engine_logits(tmp_path / "out.gguf", [40, 41])


def drop(suffix: str) -> Callable[[Stored], None]:
    def edit(stored: Stored) -> None:
        name = next(name for name in stored if name.endswith(suffix))
        del stored[name]

    return edit


def put(suffix: str, dtype: str, shape: tuple[int, ...], data: bytes) -> Callable[[Stored], None]:
    def edit(stored: Stored) -> None:
        name = next(name for name in stored if name.endswith(suffix))
        stored[name] = (dtype, shape, data)

    return edit


def rename(suffix: str, to: str) -> Callable[[Stored], None]:
    def edit(stored: Stored) -> None:
        name = next(name for name in stored if name.endswith(suffix))
        stored[name.removesuffix(suffix) + to] = stored.pop(name)

    return edit


@pytest.mark.parametrize(
    ("quantizer", "edit", "message"),
    [
        (FP8_MODELOPT, drop(".weight_scale"), "expected its scale"),
        (FP8_MODELOPT, put(".weight_scale", "F32", (7,), bytes(28)), "expected one scale in all"),
        (FP8_MODELOPT, put(".weight_scale", "I32", (), bytes(4)), "expected a dtype of BF16"),
        (FP8_MODELOPT, rename(".input_scale", ".pre_quant_scale"), "pre_quant_scale"),
        (nvfp4_modelopt, drop(".weight_scale"), "weight_scale': expected shape"),
        (nvfp4_modelopt, drop(".weight_scale_2"), "weight_scale_2': expected shape"),
        (nvfp4_modelopt, put(".weight_scale_2", "F32", (2,), bytes(8)), "expected shape []"),
        (nvfp4_modelopt, put(".weight_scale_2", "F64", (), bytes(8)), "expected a dtype of F32"),
        (nvfp4_compressed, drop(".weight_global_scale"), "weight_scale_2': expected shape"),
        (nvfp4_compressed, rename(".input_global_scale", ".weight_shape"), "weight_shape"),
    ],
)
def test_incomplete_codes_are_refused_by_name(
    quantizer: Quantizer, edit: Callable[[Stored], None], message: str, tmp_path: Path
) -> None:
    source, _ = write_quantized_model(tmp_path, all_linear(quantizer), edit=edit, **SIZES)
    with pytest.raises(ModelError) as caught:
        convert(source, ConvertOptions(out=tmp_path / "out.gguf"))
    assert message in caught.value.message


@pytest.mark.parametrize("byte", [0x7F, 0x81, 0xFF])
def test_block_scale_that_ggml_cannot_hold_is_refused(byte: int, tmp_path: Path) -> None:
    def spoil(stored: Stored) -> None:
        name = "backbone.layers.0.mixer.in_proj.weight_scale"
        dtype, shape, raw = stored[name]
        stored[name] = (dtype, shape, bytes([byte]) + raw[1:])

    source, _ = write_quantized_model(tmp_path, all_linear(nvfp4_modelopt), edit=spoil, **SIZES)
    options = ConvertOptions(out=tmp_path / "out.gguf", type_map=KEPT)
    with pytest.raises(ModelError, match=r"in_proj\.weight': 1 of .* negative or not a number"):
        convert(source, options)


@pytest.mark.parametrize(
    "scheme",
    [
        {"quant_method": "gptq"},
        {"quant_method": 7},
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": 1}}},
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        "nvfp4",
    ],
)
def test_scheme_that_the_tensors_alone_do_not_explain_is_refused(
    scheme: Any, tmp_path: Path
) -> None:
    source = write_source_model(tmp_path, config={"quantization_config": scheme})
    with pytest.raises(ModelError, match="quantization_config"):
        convert(source, ConvertOptions(out=tmp_path / "out.gguf"))


def test_calibration_of_the_kv_cache_is_no_part_of_the_model(tmp_path: Path) -> None:
    def calibrate(stored: Stored) -> None:
        scalar = ("F32", (), np.float32(0.5).tobytes())
        stored["backbone.layers.2.mixer.k_proj.k_scale"] = scalar
        stored["backbone.layers.2.mixer.v_proj.v_scale"] = scalar

    source, _ = write_quantized_model(tmp_path, mixed, edit=calibrate, **SIZES)
    convert(source, ConvertOptions(out=tmp_path / "out.gguf"))
    assert GgmlType.Q8_0 in {t.type for t in read_gguf(tmp_path / "out.gguf").tensors.values()}


def test_factor_of_zero_is_said_by_its_name(tmp_path: Path) -> None:
    zeroed = "backbone.layers.1.mixer.experts.2.up_proj"

    def edit(stored: Stored) -> None:
        stored[f"{zeroed}.weight_scale_2"] = ("F32", (), bytes(4))

    source, _ = write_quantized_model(
        tmp_path, all_linear(nvfp4_modelopt), scheme=MODELOPT, edit=edit, **SIZES
    )
    note = (
        f"{source / 'model.safetensors'}: tensor '{zeroed}.weight_scale_2' is 0:"
        f" all of '{zeroed}.weight' becomes 0"
    )
    for types in (KEPT, {}):
        out = tmp_path / f"{len(types)}.gguf"
        result = convert(source, ConvertOptions(out=out, recipe="f32", type_map=types))
        assert result.notes == (note,)


@pytest.mark.parametrize("types", [KEPT, {}], ids=["kept", "decoded"])
def test_codes_that_are_counted_one_by_one_are_the_same_codes(
    types: dict[str, str], tmp_path: Path
) -> None:
    def count_codes(stored: Stored) -> None:
        for name, (dtype, shape, raw) in stored.items():
            if dtype == "U8":
                stored[name] = ("F4", (*shape[:-1], 2 * shape[-1]), raw)

    files = []
    for edit in (None, count_codes):
        folder = tmp_path / f"{len(files)}" / "model"
        source, _ = write_quantized_model(
            folder, all_linear(nvfp4_modelopt), scheme=MODELOPT, edit=edit, **SIZES
        )
        out = folder / "out.gguf"
        convert(source, ConvertOptions(out=out, recipe="f32", type_map=types))
        gguf = read_gguf(out)
        files.append({name: tensor_data(gguf, name).tobytes() for name in gguf.tensors})
    assert files[0] == files[1]
