"""Padding: what it adds, that it changes nothing, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanorun.errors import UsageError
from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import read_gguf
from nanorun.model.gguf_arch import arch_from_gguf
from nanorun.model.tensor_roles import check_tensors
from nanorun_converters.convert import ConvertOptions, convert
from nanorun_converters.tensors.tensor_plan import PadFrame
from nanorun_quant.padding import pad_arch, padding_of, paddings
from tests.converters.mtp_reference import engine_head_logits
from tests.converters.transformers_reference import engine_logits, mean_kl
from tests.model.known_archs import LIGHTNING, NANO, NANO_4B, SUPER, TINY_PUZZLE
from tests.support.source_models import write_source_model

PUZZLE_BLOCKS: list[dict[str, Any]] = [
    {},
    {"moe_intermediate_size": 96, "num_experts_per_tok": 3},
    {},
    {"moe_intermediate_size": 64, "num_experts_per_tok": 2},
]
FAMILIES: dict[str, dict[str, Any]] = {
    "moe": {"pattern": "ME*EM"},
    "dense": {"pattern": "M-*-M"},
    "latent": {"pattern": "EM*ME", "moe_latent_size": 32},
    "groups": {"pattern": "*MEM", "n_group": 2, "topk_group": 1},
    "tied": {"pattern": "ME*", "config": {"tie_word_embeddings": True}},
    "puzzle": {"blocks": PUZZLE_BLOCKS},
    "puzzle latent": {"blocks": PUZZLE_BLOCKS, "moe_latent_size": 32, "prefix": "model."},
    "lightning": {"pattern": "ME*EM", "mtp": True},
    "super": {"pattern": "EM*ME", "mtp": True, "moe_latent_size": 32},
}
# What each is padded to where it is padded at all; an MTP head keeps the embedding.
WIDTHS = {"n_embd": 256, "n_ff": 256, "n_ff_exp": 256, "n_ff_shexp": 256}

# Rows that padding cannot make whole blocks, whole from the start.
WHOLE = {"mamba_head_dim": 64, "num_attention_heads": 4, "head_dim": 64}


def converted(source: Path, out: Path, pad: str, recipe: str = "f32") -> np.ndarray:
    convert(source, ConvertOptions(out=out, recipe=recipe, pad=pad))
    tokens = np.random.default_rng(1).integers(32, 288, 96).tolist()
    return engine_logits(out, tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_model_computes_the_same(name: str, tmp_path: Path) -> None:
    family = dict(FAMILIES[name])
    if name == "tied":
        family["edit"] = lambda tensors: tensors.pop("lm_head.weight")
    source = write_source_model(tmp_path / "source", dtype="F32", **family)
    plain = converted(source, tmp_path / "plain.gguf", "never")
    padded = converted(source, tmp_path / "padded.gguf", "always")
    assert 0 <= abs(mean_kl(plain, padded)) < 1e-9
    before, after = (
        arch_from_gguf(read_gguf(tmp_path / f"{file}.gguf")) for file in ("plain", "padded")
    )
    check_tensors(read_gguf(tmp_path / "padded.gguf"), after)
    for size, width in WIDTHS.items():
        keeps = getattr(before, size) == 0 or (size == "n_embd" and before.n_layer_nextn)
        assert getattr(after, size) == (getattr(before, size) if keeps else width)
    assert set(after.n_ff_exp_per_layer) <= {0, 256}


@pytest.mark.parametrize("name", ["lightning", "super"])
def test_padded_mtp_head_drafts_the_same(name: str, tmp_path: Path) -> None:
    source = write_source_model(tmp_path / "source", dtype="F32", **FAMILIES[name])
    drafts = []
    for pad in ("never", "always"):
        converted(source, tmp_path / f"{pad}.gguf", pad)
        drafts.append(engine_head_logits(tmp_path / f"{pad}.gguf", list(range(32, 96))))
    assert drafts[0].std() > 0.1
    assert abs(mean_kl(*drafts)) < 1e-9


def test_bundled_model_computes_the_same_padded(pico_source: Path, tmp_path: Path) -> None:
    plain = converted(pico_source, tmp_path / "plain.gguf", "never")
    padded = converted(pico_source, tmp_path / "padded.gguf", "always")
    assert abs(mean_kl(plain, padded)) < 1e-9


def test_check_of_equal_logits_sees_a_wrong_factor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source_model(tmp_path / "source", pattern="ME*EM", dtype="F32")
    plain = converted(source, tmp_path / "plain.gguf", "never")
    apply = PadFrame.apply

    def without_factor(frame: PadFrame, rows: np.ndarray, *, is_last: bool) -> np.ndarray:
        return apply(replace(frame, factor=1.0), rows, is_last=is_last)

    monkeypatch.setattr(PadFrame, "apply", without_factor)
    wrong = converted(source, tmp_path / "wrong.gguf", "always")
    assert mean_kl(plain, wrong) > 1e-6


def test_original_sizes_are_in_the_metadata(tmp_path: Path) -> None:
    source = write_source_model(tmp_path / "source", pattern="ME*", **WHOLE)
    out = tmp_path / "model.gguf"
    result = convert(source, ConvertOptions(out=out, recipe="q4_k"))
    assert result.padding == {"n_embd": (96, 256), "n_ff_exp": (64, 256), "n_ff_shexp": (128, 256)}
    assert read_gguf(out).metadata["nanorun.padding"] == [
        "n_embd:96:256", "n_ff_exp:64:256", "n_ff_shexp:128:256",
    ]  # fmt: skip
    plain = convert(source, ConvertOptions(out=out, recipe="q8_0", force=True))
    assert plain.padding == {}
    # The zeros of padding are no weights.
    assert plain.n_params == result.n_params
    n_bytes = sum(tensor.n_bytes for tensor in read_gguf(out).tensors.values())
    assert plain.bpw == pytest.approx(8 * n_bytes / plain.n_params, abs=1e-4)


@pytest.mark.parametrize("type_", [GgmlType.Q4_K, GgmlType.Q3_K, GgmlType.Q2_K])
def test_quantized_padding_stays_zero(type_: GgmlType, tmp_path: Path) -> None:
    """A zero row or column that became anything else would change answers."""
    from nanorun_quant.ggml import load_ggml

    source = write_source_model(tmp_path / "source", pattern="ME*E", **WHOLE)
    out = tmp_path / "model.gguf"
    convert(source, ConvertOptions(out=out, recipe=type_.label))
    gguf = read_gguf(out)
    for name, rows in {"blk.1.ffn_up_exps.weight": 64, "blk.1.ffn_down_shexp.weight": 96}.items():
        tensor = gguf.tensors[name]
        raw = np.fromfile(out, np.uint8, tensor.n_bytes, offset=tensor.offset)
        data = load_ggml().dequantize(raw, type_, 256).reshape(tensor.shape)
        assert data[..., :rows, :].any()
        assert not data[..., rows:, :].any()


def test_modes_pad_what_they_say() -> None:
    assert paddings(NANO, "never") == [{}]
    both = {"n_embd": (2688, 2816), "n_ff_exp": (1856, 2048), "n_ff_shexp": (3712, 3840)}
    assert paddings(NANO, "always") == [both]
    auto = paddings(NANO, "auto")
    assert auto[0] == {}
    assert auto[-1] == both
    assert len(auto) == 8
    assert paddings(NANO_4B, "always") == [{"n_embd": (3136, 3328)}]
    assert paddings(SUPER, "always") == [{"n_ff_exp": (2688, 2816)}]
    with pytest.raises(UsageError, match="--pad 'maybe' is none of auto never always"):
        paddings(NANO, "maybe")


def test_mtp_head_forbids_padding_the_embedding() -> None:
    assert all("n_embd" not in padding for padding in paddings(LIGHTNING, "auto"))
    with pytest.raises(UsageError, match="n_embd cannot be padded: the MTP head ends in a Layer"):
        padding_of(LIGHTNING, ["n_embd"])


def test_widths_that_vary_are_padded_one_by_one() -> None:
    padding = padding_of(TINY_PUZZLE, ["n_ff_exp"])
    assert padding == {"n_ff_exp": (64, 256), "n_ff_exp.1": (32, 256), "n_ff_exp.3": (64, 256)}
    arch = pad_arch(TINY_PUZZLE, padding)
    assert arch.n_ff_exp_per_layer == (0, 256, 0, 256, 0)
    arch.validate()
