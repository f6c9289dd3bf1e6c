"""llama.cpp's presets without fallbacks: its own tool's types, where nothing falls back."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from nanorun.model.gguf import read_gguf
from nanorun_converters.convert import ConvertOptions, convert
from nanorun_quant.fit import fit_recipe
from nanorun_quant.presets import PRESETS
from nanorun_quant.recipe_names import recipe_by_name
from tests.converters.tensors.test_padding import WHOLE
from tests.model.known_archs import NANO, SUPER
from tests.support.source_models import write_source_model

# llama_ftype of llama.h.
FTYPES = {"Q4_K_M": 15, "Q3_K_M": 12, "Q2_K": 10, "Q5_K_M": 17, "IQ4_XS": 30, "Q3_K_L": 13,
          "Q4_K_S": 14, "Q4_0": 2, "MXFP4_MOE": 38}  # fmt: skip

# GB of Nano and Super (with MTP) padded, by llama.cpp's own dry run on files of those shapes.
NANO_GB = {"Q2_K": 13.88, "IQ2_XXS": 9.73, "IQ2_XS": 10.77, "IQ2_M": 12.09, "IQ3_XXS": 15.06,
           "IQ3_S": 15.77, "Q3_K_M": 18.16, "IQ4_XS": 19.65, "Q4_K_S": 20.72, "Q4_K_M": 22.66,
           "Q5_K_M": 26.12, "Q6_K": 29.79}  # fmt: skip
SUPER_GB = {"Q2_K": 49.21, "IQ2_XXS": 34.52, "IQ2_XS": 38.24, "IQ2_M": 42.94, "IQ3_XXS": 53.81,
            "IQ3_S": 56.01, "Q3_K_M": 64.56, "IQ4_XS": 70.23, "Q4_K_S": 74.01, "Q4_K_M": 81.18,
            "Q5_K_M": 93.31, "Q6_K": 106.2}  # fmt: skip


@pytest.mark.parametrize("name", NANO_GB)
def test_sizes_are_those_of_llama_quantize_on_padded_shapes(name: str) -> None:
    recipe = recipe_by_name(name)
    assert fit_recipe(recipe, NANO, again=str).tensor_bytes / 1e9 == pytest.approx(
        NANO_GB[name], abs=0.0051
    )
    found = fit_recipe(recipe, SUPER, again=str).tensor_bytes / 1e9
    assert found == pytest.approx(SUPER_GB[name], abs=0.051 if SUPER_GB[name] > 100 else 0.0051)


def quantized_by_llama(source: Path, target: Path, ftype: int) -> dict[str, str]:
    from nanorun.runtime.llama.binding import load_llama

    llama = load_llama()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, 1
    assert (
        llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
        == 0
    )
    return {name: tensor.type.label for name, tensor in read_gguf(target).tensors.items()}


@pytest.mark.parametrize("name", FTYPES)
@pytest.mark.parametrize(
    "shape",
    [{"pattern": "ME*EMEM*EM*EMEMEM*E", "n_routed_experts": 8}, {"pattern": "ME*EMEM*EM*E"},
     {"pattern": "M-*-M-*-M-M-M-*-"}],
    ids=["8 experts", "4 experts", "dense"],
)  # fmt: skip
def test_types_are_those_of_llama_quantize(shape: dict, name: str, tmp_path: Path) -> None:
    source = write_source_model(tmp_path / "source", **shape, **WHOLE, hidden_size=64)
    padded = tmp_path / "padded.gguf"
    convert(source, ConvertOptions(out=padded, recipe="f32", pad="always"))
    expected = quantized_by_llama(padded, tmp_path / "theirs.gguf", FTYPES[name])
    ours = tmp_path / "ours.gguf"
    convert(source, ConvertOptions(out=ours, recipe=name, pad="always"))
    found = {key: tensor.type.label for key, tensor in read_gguf(ours).tensors.items()}
    assert found == expected


def test_every_preset_is_known_in_either_case() -> None:
    for name in PRESETS:
        assert recipe_by_name(name).name == name
    assert recipe_by_name("iq3_m").name == "IQ3_M"
