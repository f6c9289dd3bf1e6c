"""Weights of methods that nanorun does not read are called by the method's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanorun.errors import ModelError
from nanorun_converters.opened.open_model import open_model
from nanorun_converters.options import ConvertOptions
from tests.support.source_models import write_safetensors, write_source_model

Q = "backbone.layers.2.mixer.q_proj"
Entries = dict[str, tuple[str, tuple[int, ...], bytes]]

METHODS: dict[str, Entries] = {
    "bitsandbytes": {
        f"{Q}.weight": ("U8", (4, 1), bytes(4)),
        f"{Q}.weight.absmax": ("F32", (1,), bytes(4)),
        f"{Q}.weight.quant_state.bitsandbytes__nf4": ("U8", (4,), bytes(4)),
    },
    "bitsandbytes ": {
        f"{Q}.weight": ("I8", (2, 2), bytes(4)), f"{Q}.SCB": ("F32", (2,), bytes(8)),
    },
    "GPTQ": {
        f"{Q}.qweight": ("I32", (1, 4), bytes(16)), f"{Q}.qzeros": ("I32", (1, 1), bytes(4)),
        f"{Q}.scales": ("F16", (1, 4), bytes(8)), f"{Q}.g_idx": ("I32", (4,), bytes(16)),
    },
    "AWQ": {
        f"{Q}.qweight": ("I32", (4, 1), bytes(16)), f"{Q}.qzeros": ("I32", (1, 1), bytes(4)),
        f"{Q}.scales": ("F16", (1, 4), bytes(8)),
    },
    "MXFP4": {
        f"{Q}.weight": ("U8", (2, 16), bytes(32)),
        f"{Q}.weight_scale": ("U8", (2, 1), bytes(2)),
    },
    "MXFP4 ": {
        "backbone.layers.1.mixer.experts.up_proj_blocks": ("U8", (2, 16), bytes(32)),
        "backbone.layers.1.mixer.experts.up_proj_scales": ("U8", (2, 1), bytes(2)),
    },
    "MLX": {
        f"{Q}.weight": ("U32", (2, 4), bytes(32)), f"{Q}.scales": ("BF16", (2, 1), bytes(4)),
        f"{Q}.biases": ("BF16", (2, 1), bytes(4)),
    },
    "compressed-tensors": {
        f"{Q}.weight_packed": ("I32", (2, 4), bytes(32)),
        f"{Q}.weight_scale": ("BF16", (2, 1), bytes(4)),
    },
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_method_is_named_without_its_field_in_the_config(method: str, tmp_path: Path) -> None:
    folder = write_source_model(tmp_path, config={"_name_or_path": "me/my-tune"})
    write_safetensors(folder / "model.safetensors", METHODS[method])
    with pytest.raises(ModelError, match=f": quantized by {method.strip()}.*, which") as caught:
        open_model(folder, ConvertOptions())
    assert "fine-tune" in caught.value.facts[0]
    assert caught.value.tries == ("nanorun convert me/my-tune",)


@pytest.mark.parametrize(("name", "label"), [("bitsandbytes", "bitsandbytes"), ("gptq", "GPTQ")])
def test_method_is_named_by_its_field_in_the_config(name: str, label: str, tmp_path: Path) -> None:
    folder = write_source_model(tmp_path, config={"quantization_config": {"quant_method": name}})
    with pytest.raises(ModelError, match=f"quant_method '{name}': quantized by {label}"):
        open_model(folder, ConvertOptions())
