"""The search for types on a source model: size, use of the imatrix, and that it pays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nanorun.errors import UsageError
from nanorun.model.engine_options import EngineOptions
from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import read_gguf
from nanorun.runtime.measure.divergence import measure
from nanorun.runtime.measure.imatrix import collect_imatrix
from nanorun_converters.convert import ConvertOptions, convert
from nanorun_converters.types import search as allocate
from nanorun_converters.types.importance import importance, with_measured
from tests.model.known_archs import LIGHTNING, SUPER, TINY_MOE

CALIBRATION = "What is 47 + 86? 7+6+0=13, 4+8+1=13 133. " * 60
TEXT = "What is 905 + 28? 5+8+0=13, 0+2+1=3, 9+0+0=9 933. " * 40
OPTIONS = EngineOptions(n_threads=1)


@pytest.fixture(autouse=True)
def small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocate, "N_SAMPLED", 2**14)


@pytest.fixture(scope="module")
def imatrix(pico_f32_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    collect_imatrix(pico_f32_gguf, CALIBRATION, "text", out, 256, OPTIONS)
    return out


def test_searched_file_is_within_its_size_and_better_than_a_recipe_of_that_size(
    pico_source: Path, pico_f32_gguf: Path, imatrix: Path, tmp_path: Path
) -> None:
    fixed, searched = tmp_path / "fixed.gguf", tmp_path / "searched.gguf"
    made = convert(pico_source, ConvertOptions(out=fixed, recipe="12g", imatrix=imatrix))
    found = convert(
        pico_source,
        ConvertOptions(out=searched, target_bytes=made.bytes, imatrix=imatrix, pad="never"),
    )
    assert 0.98 * made.bytes <= found.bytes <= made.bytes
    assert found.recipe.startswith("search-")
    of_fixed, of_searched = measure(pico_f32_gguf, [fixed, searched], TEXT, 256, OPTIONS)
    assert of_searched.kld_mean < 0.7 * of_fixed.kld_mean


def test_search_is_deterministic_and_in_the_metadata(pico_source: Path, tmp_path: Path) -> None:
    options = {"target_bpw": 4.5, "pad": "never"}
    for name in ("a.gguf", "b.gguf"):
        convert(pico_source, ConvertOptions(out=tmp_path / name, **options))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    gguf = read_gguf(tmp_path / "a.gguf")
    assert "Lagrangian" in gguf.metadata["nanorun.search.method"]
    table = dict(line.split("=") for line in gguf.metadata["nanorun.search.types"])
    assert table["output.weight"].split(":")[0] == gguf.tensors["output.weight"].type.label
    n_bytes = sum(tensor.n_bytes for tensor in gguf.tensors.values())
    assert 0.98 <= 8 * n_bytes / gguf.n_params / 4.5 <= 1


def test_size_that_cannot_be_met_is_refused_with_one_that_can(
    pico_source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"no types make this model as small as") as caught:
        convert(pico_source, ConvertOptions(target_bytes=900_000, pad="never"))
    command = f"nanorun convert {pico_source} --target-size "
    n_bytes, *flags = caught.value.tries[0].removeprefix(command).split()
    assert flags == ["--pad", "never"]
    options = ConvertOptions(target_bytes=int(n_bytes), pad="never", out=tmp_path / "out.gguf")
    assert convert(pico_source, options).bytes <= int(n_bytes)
    with pytest.raises(UsageError, match="give one"):
        convert(pico_source, ConvertOptions(target_bytes=1, target_bpw=1))


def test_importance_follows_the_power_a_layer_adds() -> None:
    names = {"token_embd", "output", "blk.1.ffn_up_exps", "blk.1.ffn_down_exps",
             "blk.3.ffn_up_exps", "blk.1.ffn_up_shexp", "blk.1.ffn_down_shexp",
             "blk.3.ffn_down_exps",
             "blk.3.ffn_up_shexp", "blk.3.ffn_down_shexp", "blk.0.ssm_in", "blk.0.ssm_out",
             "blk.4.ssm_in", "blk.4.ssm_out", "blk.2.attn_q", "blk.2.attn_k", "blk.2.attn_v",
             "blk.2.attn_output"}  # fmt: skip
    powers = {f"{name}.weight": 1.0 for name in names} | {"token_embd.weight": 16.0}
    quiet = powers | {"blk.2.attn_output.weight": 0.001}
    before, after = importance(TINY_MOE, powers), importance(TINY_MOE, quiet)
    assert after["blk.2.attn_q.weight"] < 0.01 * before["blk.2.attn_q.weight"]
    assert before["blk.2.attn_q.weight"] == before["blk.2.attn_output.weight"]
    # What is written last is not computed from any more.
    assert before["blk.4.ssm_out.weight"] < 0.2 * before["blk.0.ssm_out.weight"]


def test_measured_sensitivity_corrects_the_model_and_keeps_its_scale() -> None:
    modelled = {"a": 1.0, "b": 2.0, "c": 4.0, "unmeasured": 8.0}
    assert with_measured(modelled, {}) == modelled
    assert with_measured(modelled, {"a": 0.0}) == modelled
    same = with_measured(modelled, {"a": 10.0, "b": 20.0, "c": 40.0})
    assert same == pytest.approx({name: 10 * factor for name, factor in modelled.items()})
    found = with_measured(modelled, {"a": 10.0, "b": 20.0, "c": 4000.0})
    assert found["c"] / found["a"] == pytest.approx(4 * 10)  # the mean of 4 and 400
    assert found["unmeasured"] / found["a"] == pytest.approx(8)
    assert with_measured(modelled, {"a": 10.0, "b": 20.0, "c": 0.0})["c"] > 0


def test_search_of_a_generous_size_keeps_what_matters_in_f16(
    pico_source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    convert(pico_source, ConvertOptions(out=out, target_bpw=9.5, pad="never"))
    types = {t.type for t in read_gguf(out).tensors.values()}
    assert GgmlType.F16 in types


@pytest.mark.parametrize("arch", [LIGHTNING, SUPER], ids=["mtp", "latent mtp"])
def test_importance_knows_every_tensor_of_the_released_models(arch: object) -> None:
    from nanorun.model.arch import HybridArch
    from nanorun.model.tensor_roles import expected_tensors

    assert isinstance(arch, HybridArch)
    names = [s.name for s in expected_tensors(arch).values() if s.quantizable]
    factors = importance(arch, dict.fromkeys(names, 1.0))
    assert factors.keys() == set(names)
    assert all(np.isfinite(factor) and factor > 0 for factor in factors.values())
