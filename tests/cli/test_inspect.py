from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nanorun.cli.app import invoke
from nanorun.errors import ModelError, UsageError
from nanorun.model.ggml_type import GgmlType
from tests.model.known_archs import TINY_LATENT_MTP, TINY_PUZZLE
from tests.support.builders import Tensor, arch_tensors, gguf_metadata, write_gguf
from tests.support.quantized_sources import nvfp4_modelopt, write_quantized_model
from tests.support.source_models import write_source_model

ARCH = TINY_LATENT_MTP
NANORUN_KEYS = {
    "general.name": "a [b]tiny[/b] one",
    "nanorun.recipe": "q8_0",
    "nanorun.source.repository": "owner/tiny",
    "nanorun.source.revision": "abc123",
    "nanorun.padding": ["n_ff_exp:24:32"],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = arch_tensors(ARCH, GgmlType.Q8_0)
    return write_gguf(tmp_path / "tiny.gguf", gguf_metadata(ARCH) | NANORUN_KEYS, tensors)


def inspect_json(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, Any]:
    assert invoke(["inspect", str(path), "--json"]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


def test_json_has_the_keys_of_the_contract(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = inspect_json(capsys, path)
    tensors = shown.pop("tensors")
    n_bytes = sum(t["bytes"] for t in tensors)
    assert shown["arch"] == "nemotron_h_moe"
    assert shown["name"] == "a [b]tiny[/b] one"
    assert shown["pattern"] == "ME*EM"
    assert shown["n_layer"] == 5
    assert shown["n_ctx_train"] == 4096
    assert shown["bytes"] == path.stat().st_size
    assert shown["bpw"] == round(8 * n_bytes / shown["n_params"], 4)
    assert shown["recipe"] == "q8_0"
    assert shown["source"] == "owner/tiny@abc123"
    assert shown["padding"] == ["n_ff_exp:24:32"]
    assert sum(shown["types"].values()) == len(tensors)
    assert shown["hybrid"]["n_layer_nextn"] == 1
    assert shown["hybrid"]["state_bytes"] == 2 * 4 * (3 * 128 + 16 * 64)


def test_json_lists_every_tensor(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = inspect_json(capsys, path)
    rows = {row["name"]: row for row in shown["tensors"]}
    assert list(rows) == [t.name for t in arch_tensors(ARCH)]
    assert rows["blk.1.ffn_up_exps.weight"] == {
        "name": "blk.1.ffn_up_exps.weight",
        "type": "q8_0",
        "shape": [8, 32, 32],
        "bytes": 8 * 32 * 34,
        "role": "expert_up",
    }


def test_file_of_another_converter_has_no_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "foreign.gguf"
    write_gguf(path, gguf_metadata(TINY_PUZZLE), arch_tensors(TINY_PUZZLE))
    shown = inspect_json(capsys, path)
    assert (shown["name"], shown["recipe"], shown["source"]) == ("foreign", None, None)
    assert shown["bpw"] == 32


def test_table_shows_what_each_role_became(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "a [b]tiny[/b] one" in out
    assert "5: 2 SSM (M), 1 attention (*), 2 MoE (E), 1 MTP" in out
    assert "3 of 8 used, 1 shared" in out
    assert "n_ff_exp:24:32" in out
    assert re.search(r"^expert_up +q8_0 +3 +25\.5 KiB$", out, re.MULTILINE)
    assert "blk.1.ffn_up_exps.weight" not in out


def test_tensors_flag_lists_tensors(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["inspect", str(path), "--tensors"]) == 0
    out = capsys.readouterr().out
    row = r"^blk\.1\.ffn_up_exps\.weight +expert_up +q8_0 +8 x 32 x 32 +8\.5 KiB$"
    assert re.search(row, out, re.MULTILINE)


def test_source_model_shows_its_own_tensors(
    pico_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = inspect_json(capsys, pico_source)
    assert shown["arch"] == "nemotron_h_moe"
    assert shown["n_layer"] == len(shown["pattern"])
    assert (shown["recipe"], shown["bpw"]) == (None, 16)
    assert {t["role"] for t in shown["tensors"]} == {None}
    assert "backbone.embeddings.weight" in {t["name"] for t in shown["tensors"]}
    assert invoke(["inspect", str(pico_source)]) == 0
    assert re.search(r"^all +bf16 ", capsys.readouterr().out, re.MULTILINE)


def test_quantized_source_model_is_counted_in_numbers_not_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 192, "num_attention_heads": 3}
    whole = write_source_model(tmp_path / "whole", **sizes)
    packed, _ = write_quantized_model(
        tmp_path / "packed", lambda name: nvfp4_modelopt if ".experts." in name else None, **sizes
    )
    n_params = inspect_json(capsys, whole)["n_params"]
    assert inspect_json(capsys, packed)["n_params"] == n_params


def test_source_model_that_cannot_be_converted_as_it_is_names_the_command_that_can(
    tmp_path: Path,
) -> None:
    head = {"mtp_hybrid_override_pattern": "**"}
    folder = write_source_model(tmp_path / "model", mtp=True, config=head)
    with pytest.raises(ModelError) as caught:
        invoke(["inspect", str(folder)])
    assert caught.value.tries == (f"nanorun convert {folder} --no-mtp",)


def test_damaged_file_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="it is truncated"):
        invoke(["inspect", str(path)])
    assert capsys.readouterr().out == ""


def test_file_that_the_engine_would_refuse_is_refused(tmp_path: Path) -> None:
    tensors = [*arch_tensors(ARCH), Tensor("blk.0.other.weight", GgmlType.F32, (1,))]
    path = write_gguf(tmp_path / "m.gguf", gguf_metadata(ARCH), tensors)
    with pytest.raises(ModelError, match=r"tensor 'blk\.0\.other\.weight'"):
        invoke(["inspect", str(path)])


def test_other_architecture_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"})
    with pytest.raises(ModelError, match=r"not a Nemotron-H model: .* is 'llama'"):
        invoke(["inspect", str(path)])


def test_unknown_name_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="there is no model 'pica'"):
        invoke(["inspect", "pica"])


def test_source_model_without_its_head_is_shown_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_source_model(tmp_path, config={"num_nextn_predict_layers": 1})
    assert invoke(["inspect", str(folder)]) == 0
    assert "there are no mtp.* weights; left out" in capsys.readouterr().err
