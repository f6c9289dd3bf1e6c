"""`eval --against`, `imatrix`, `quantize-stats` and the flags of `convert` that go with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanorun_quant.recipes import RECIPES
from tests.cli.conftest import Result
from tests.support.source_models import write_source_model

Run = Callable[..., Result]
TEXT = "What is 47 + 86? " * 60


def test_eval_against_prints_the_keys_of_the_contract(
    nanorun: Run, pico_gguf: Path, pico_f32_gguf: Path, tmp_path: Path
) -> None:
    text, plot = tmp_path / "text.txt", tmp_path / "plot.svg"
    text.write_text(TEXT)
    flags = ["--text", str(text), "--against", str(pico_f32_gguf), "--n-ctx", "128"]
    result = nanorun("eval", str(pico_gguf), *flags, "--json")
    assert json.loads(result.out).keys() == {
        "n_tokens", "ppl", "kld_mean", "kld_p99", "top1_agreement",
    }  # fmt: skip
    result = nanorun("eval", str(pico_gguf), str(pico_f32_gguf), *flags, "--plot", str(plot))
    assert result.code == 0
    header, *rows = result.out.splitlines()
    assert header.split()[:2] == ["KLD", "mean"]
    assert [row.split()[-1] for row in rows] == [str(pico_gguf), str(pico_f32_gguf)]
    assert plot.read_text().startswith("<svg")


def test_eval_of_several_models_wants_a_reference(nanorun: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    result = nanorun("eval", "a.gguf", "b.gguf", "--text", str(text))
    assert result.code == 2
    assert "--against REF" in result.err


def test_help_of_convert_names_every_recipe_in_the_order_of_the_recipes(nanorun: Run) -> None:
    words = nanorun("convert", "--help").out.split()
    first = words.index("--recipe") + 2
    named = [word.rstrip(",;") for word in words[first : first + len(RECIPES)]]
    assert named == list(RECIPES)


def test_imatrix_is_collected_and_lets_convert_go_lower(
    nanorun: Run, pico_source: Path, pico_f32_gguf: Path, tmp_path: Path
) -> None:
    text, imatrix = tmp_path / "text.txt", tmp_path / "i.gguf"
    text.write_text(TEXT)
    out = str(tmp_path / "model.gguf")
    recipe = ("convert", str(pico_source), "--recipe", "iq3_xxs", "--out", out)
    refused = nanorun(*recipe)
    assert refused.code == 2
    assert "recipe iq3_xxs needs an imatrix" in refused.err
    assert "nanorun imatrix " in refused.err
    result = nanorun(
        "imatrix", str(pico_f32_gguf), "--text", str(text), "--out", str(imatrix), "--n-ctx", "64",
        "--gram", "--json",
    )  # fmt: skip
    assert json.loads(result.out).keys() == {
        "path", "n_chunks", "n_tensors", "n_unseen", "n_sensitivity", "n_grams",
    }  # fmt: skip
    made = nanorun(*recipe, "--imatrix", str(imatrix))
    assert made.code == 0
    assert "padded: n_embd 320 to 512 (+60.0%)" in made.out
    assert "quantized by ggml, error feedback" in made.out
    again = nanorun(*recipe, "--imatrix", str(imatrix), "--feedback", "never", "--force")
    assert again.code == 0
    assert "error feedback" not in again.out


def test_sensitivity_goes_into_the_imatrix_and_from_there_into_the_search(
    nanorun: Run, pico_source: Path, pico_f32_gguf: Path, tmp_path: Path
) -> None:
    from nanorun.model.gguf import read_gguf

    text, imatrix, out = tmp_path / "text.txt", tmp_path / "i.gguf", tmp_path / "model.gguf"
    text.write_text(TEXT)
    result = nanorun(
        "imatrix", str(pico_f32_gguf), "--text", str(text), "--out", str(imatrix), "--n-ctx", "64",
        "--sensitivity", "1", "--json",
    )  # fmt: skip
    assert json.loads(result.out)["n_sensitivity"] > 20
    made = nanorun(
        "convert", str(pico_source), "--target-bpw", "5", "--pad", "never", "--out", str(out),
        "--imatrix", str(imatrix),
    )  # fmt: skip
    assert made.code == 0, made.err
    assert "measured sensitivity" in read_gguf(out).metadata["nanorun.search.method"]


def test_dry_run_needs_no_imatrix_and_says_why_a_type_is_not_the_first_choice(
    nanorun: Run, pico_source: Path
) -> None:
    result = nanorun("convert", str(pico_source), "--recipe", "16g", "--dry-run")
    assert result.code == 0
    result = nanorun("convert", str(pico_source), "--recipe", "q4", "--dry-run")
    assert "next choice: q4_k has blocks of 256, rows are 320" in result.out


def test_quantize_stats_gives_type_bytes_and_error_of_each_role(
    nanorun: Run, tmp_path: Path
) -> None:
    source = write_source_model(tmp_path / "source", pattern="ME*")
    result = nanorun("quantize-stats", str(source), "--recipe", "q8_0", "--json")
    stats = json.loads(result.out)
    assert stats["expert_up"].keys() == {"type", "bytes", "rel_rmse"}
    assert stats["expert_up"]["type"] == "q8_0"
    assert 0.003 < stats["expert_up"]["rel_rmse"] < 0.007
    worse = json.loads(nanorun("quantize-stats", str(source), "--recipe", "q4_0", "--json").out)
    assert worse["ssm_in"]["rel_rmse"] > 5 * stats["ssm_in"]["rel_rmse"]


def write_nano_without_weights(folder: Path) -> Path:
    """Nano's config and the index of its files, which are not there."""
    from nanorun.model.arch import LayerKind
    from tests.converters.family.test_config import NANO_CONFIG
    from tests.model.known_archs import NANO

    names = ["backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"]
    of_kind = {
        LayerKind.SSM: ["A_log", "D", "dt_bias", "conv1d.weight", "conv1d.bias", "norm.weight",
                        "in_proj.weight", "out_proj.weight"],
        LayerKind.ATTENTION: [f"{letter}_proj.weight" for letter in "qkvo"],
        LayerKind.MOE: [
            "gate.weight", "gate.e_score_correction_bias", "shared_experts.up_proj.weight",
            "shared_experts.down_proj.weight",
            *(f"experts.{i}.{side}_proj.weight" for i in range(128) for side in ("up", "down")),
        ],
    }  # fmt: skip
    for i, kind in enumerate(NANO.layers):
        names.append(f"backbone.layers.{i}.norm.weight")
        names += [f"backbone.layers.{i}.mixer.{name}" for name in of_kind[kind]]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(NANO_CONFIG))
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_dry_run_on_the_shapes_of_nano_fits_small_cards(nanorun: Run, tmp_path: Path) -> None:
    source = str(write_nano_without_weights(tmp_path / "nano"))

    def plan(recipe: str) -> dict[str, Any]:
        result = nanorun("convert", source, "--recipe", recipe, "--dry-run", "--json")
        assert result.code == 0, result.err
        return json.loads(result.out)

    q4, card_16, card_12 = plan("q4"), plan("16g"), plan("12g")
    assert card_16["bytes"] <= 14.6e9
    assert card_12["bytes"] <= 10.8e9
    assert q4["bytes"] <= 18.9e9 < 24.5e9
    assert q4["n_params"] == 31_577_940_288
    assert q4["types"]["iq4_nl"] == 2 * 23 + 1
    assert q4["bpw"] == pytest.approx(4.62, abs=0.005)
    assert card_16["padding"] == {
        "n_embd": [2688, 2816], "n_ff_exp": [1856, 2048], "n_ff_shexp": [3712, 3840],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "recipe", "profile", "n_ctx"),
    [
        ("nano", "12g", "rtx-3060-12g", 131072),
        ("nano", "16g", "rtx-4060-ti-16g", 131072),
        ("nano", "24g", "rtx-4090", 262144),
        ("nano", "32g", "rtx-5090", 1048576),
        ("super", "spark", "dgx-spark", 1048576),
    ],
)
def test_recipes_named_for_a_device_fit_it_with_the_context_they_state(
    nanorun: Run, model: str, recipe: str, profile: str, n_ctx: int
) -> None:
    hardware = Path(__file__).parents[1] / "data" / "hardware" / f"{profile}.json"
    result = nanorun(
        "plan", model, "--recipe", recipe, "--hardware", str(hardware), "--n-ctx", str(n_ctx),
        "--kv", "f16", "--json",
    )  # fmt: skip
    plan = json.loads(result.out)
    assert plan["fits"]
    assert (plan["n_ctx"], plan["type_k"], plan["n_cpu_moe"]) == (n_ctx, "f16", 0)
    assert plan["n_gpu_layers"] == -1
    device = plan["devices"][0]
    # What the planner keeps back for surprises is not headroom; this comes on top of it.
    assert device["free_bytes"] - device["total_bytes"] >= 400 * 2**20
    assert f"{n_ctx // 1024}k" in RECIPES[recipe].summary.replace("1M", "1024k")
