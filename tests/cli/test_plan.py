from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanorun.cli.app import invoke
from nanorun.cli.planning import parse_wish
from nanorun.cli.shapes import shape_of_file
from nanorun.errors import MemoryPlanError, UsageError
from nanorun.model.engine_options import EngineOptions
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import expected_tensors
from nanorun.plan.memory_plan import plan_model
from nanorun.plan.smaller import smaller_plans
from nanorun_converters.opened.shape_file import write_shape
from tests.cli.conftest import Result
from tests.model.known_archs import NANO, TINY_MOE
from tests.plan.profiles import FOLDER, profile
from tests.support.builders import arch_tensors, gguf_metadata, write_gguf

PARTS = ("weights", "kv", "state", "checkpoint", "compute", "output", "overhead")
ON_4090 = ("--hardware", str(FOLDER / "rtx-4090.json"))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_gguf(
        tmp_path / "tiny.gguf", gguf_metadata(TINY_MOE), arch_tensors(TINY_MOE, GgmlType.Q8_0)
    )


def plan_json(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert invoke(["plan", *args, "--json"]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


def test_json_has_the_keys_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan_json(capsys, "nano", "--n-ctx", "256k", *ON_4090)
    assert shown["fits"] is True
    assert shown["n_ctx"] == 262144
    expected = {"type_k", "type_v", "n_ubatch", "n_gpu_layers", "n_cpu_moe", "n_seq_max",
                "decode_tps", "prefill_tps", "why", "tries"}  # fmt: skip
    assert expected <= set(shown)
    gpu, host = shown["devices"]
    assert (gpu["name"], host["name"]) == ("CUDA0", "CPU")
    for device in (gpu, host):
        parts = [device[f"{part}_bytes"] for part in PARTS]
        assert sum(parts) == device["total_bytes"] <= device["free_bytes"]


def test_text_shows_every_device_and_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["plan", "nano", "--n-ctx", "1M", *ON_4090]) == 0
    out = capsys.readouterr().out
    assert out.startswith("nano (")
    assert "\nCUDA0  " in out and "\nCPU  " in out
    assert "n_ctx 1,048,576: as asked" in out
    assert "t/s" in out.splitlines()[0]


def test_recipe_and_size_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_json(capsys, "nano:q4", *ON_4090)["recipe"] == "q4"
    assert plan_json(capsys, "nano", "--recipe", "mxfp4", *ON_4090)["recipe"] == "mxfp4"


def test_file_is_planned_with_the_types_it_has(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = plan_json(capsys, str(tiny), "--n-ctx", "max", "--kv", "q8_0", "--device", "cpu")
    assert shown["n_ctx"] == TINY_MOE.n_ctx_train
    assert shown["type_k"] == "q8_0"
    assert shown["recipe"] is None
    assert shown["n_gpu_layers"] == 0 or shown["n_gpu_layers"] == -1


def test_source_model_is_planned_from_its_config(
    pico_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = (pico_source / "config.json").read_text()
    (folder / "config.json").write_text(config)
    shown = plan_json(capsys, str(folder), "--recipe", "q8_0", "--n-ctx", "1024")
    assert shown["recipe"] == "q8_0"


def test_limits_of_memory_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan_json(capsys, "nano", "--vram", "12GiB", "--ram", "16GiB", *ON_4090)
    assert [device["free_bytes"] for device in shown["devices"]] == [12 * 2**30, 16 * 2**30]


def test_model_that_does_not_fit_says_so_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", "super", "--n-ctx", "1M", "--ram", "16GiB", "--device", "cpu", "--json"]
    with pytest.raises(MemoryPlanError):
        invoke(args)
    shown = json.loads(capsys.readouterr().out)
    assert shown["fits"] is False
    assert any("vllm serve nvidia/" in line for line in shown["tries"])


# Exit codes as a shell sees them: 2 for what cannot be meant, 4 for what cannot be had.
@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--n-ctx", "0"], 2, "not a number of tokens: '0'"),
        (["--n-ctx", "2M"], 2, "n_ctx 2,097,152 is outside"),
        (["--parallel", "300"], 2, "300 sequences asked for"),
        (["--parallel", "0"], 2, "0 sequences asked for"),
        (["--device", "cuda:3"], 2, "there is no device 'cuda:3'"),
        (["--kv", "q5_k"], 2, "a KV cache is one of f16, q8_0, q4_0"),
        (["--recipe", "q99"], 2, "there is no recipe 'q99'"),
        (["--vram", "much"], 2, "not a size: 'much'"),
        (["--hardware", "missing.json"], 2, "missing.json cannot be read"),
        (["--verify"], 2, "cannot be asked about CUDA0 of"),
        (["--draft", "magic"], 2, "--draft magic: it is off, lookup or mtp"),
        (["--verify", "--device", "cpu"], 2, "nano is not a file"),
        (["--probe"], 2, "cannot be asked about CUDA0 of"),
        (["--ram", "1GiB", "--vram", "1GiB"], 4, "but CPU has 1.0 GiB free"),
        (["--parallel", "250", "--device", "cpu", "--ram", "18GiB"], 4, "SSM state 11.6 GiB"),
    ],
)
def test_bad_wishes_end_with_their_code(
    nanorun: Any, args: list[str], code: int, text: str
) -> None:
    machine = () if "--hardware" in args else ON_4090
    result: Result = nanorun("plan", "nano", *args, *machine)
    assert result.code == code
    assert text in result.err
    assert result.err.startswith("nanorun: error:")


def test_suggestions_keep_the_machine_that_was_described(nanorun: Any) -> None:
    result: Result = nanorun("plan", "nano:q4", "--n-ctx", "1M", "--ram", "19GiB", "--kv", "f16",
                             "--hardware", str(FOLDER / "cpu-24g.json"))  # fmt: skip
    assert result.code == 4
    machine = f"--ram 19GiB --hardware {FOLDER / 'cpu-24g.json'}"
    (shorter,) = [line for line in result.err.splitlines() if "nano:q4 --n-ctx" in line
                  and "--kv" not in line]  # fmt: skip
    assert f"nanorun plan {machine} nano:q4 --n-ctx " in shorter
    assert nanorun(*shorter.split("nanorun ")[1].split()).code == 0


def test_speed_of_another_machine_cannot_be_measured() -> None:
    with pytest.raises(UsageError, match="--measure-speed times this machine"):
        invoke(["plan", "nano:q4", "--measure-speed", *ON_4090])


def test_recipe_of_a_file_is_refused(tiny: Path) -> None:
    with pytest.raises(UsageError, match="is for models that are still to be converted"):
        invoke(["plan", str(tiny), "--recipe", "q4"])


def test_options_open_the_engine_as_planned(tiny: Path) -> None:
    wish = parse_wish("2048", default_n_ctx=8192, fixed=EngineOptions(n_parallel=2))
    options = plan_model([shape_of_file("tiny", tiny)], profile("rtx-4090"), wish).options
    assert (options.n_ctx, options.n_parallel, options.n_gpu_layers) == (2048, 2, -1)
    assert options.type_k is GgmlType.F16
    assert options.n_batch == options.n_ubatch


def test_options_leave_experts_on_the_host_where_the_plan_does(tmp_path: Path) -> None:
    path = tmp_path / "nano.gguf"
    types = {s.name: GgmlType.Q4_0 if s.quantizable else GgmlType.F32
             for s in expected_tensors(NANO).values()}  # fmt: skip
    write_shape(path, NANO, types)
    wish = parse_wish("32k", default_n_ctx=8192)
    plan = plan_model([shape_of_file("nano", path)], profile("rtx-3060-12g"), wish)
    options = plan.options
    assert options.n_gpu_layers == -1
    assert 0 < options.n_cpu_moe < 52
    smaller = smaller_plans(plan)
    n_cpu_moe = [less.plan.options.n_cpu_moe for less in smaller]
    assert n_cpu_moe == sorted(n_cpu_moe)
    assert smaller[0].change.startswith(
        f"blocks with experts in main memory {options.n_cpu_moe} -> "
    )


@pytest.mark.parametrize(("text", "n_ctx"), [(None, 8192), ("max", None), ("1M", 1048576)])
def test_context_is_read_from_the_flag(text: str | None, n_ctx: int | None) -> None:
    assert parse_wish(text, default_n_ctx=8192).n_ctx == n_ctx


@pytest.mark.parametrize("model", ["nano:q4_0", "lightning:q4_0", "super:q4", "nano-4b:q8_0"])
def test_probe_of_a_model_that_is_not_here_agrees(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    on = ("--hardware", str(FOLDER / "dgx-spark.json"), "--device", "cpu", "--n-ctx", "128k")
    shown = plan_json(capsys, model, "--probe", *on)
    assert shown["max_error"] < 0.01
    (device,) = shown["devices"]
    assert set(shown["probed"]) == {"kv_bytes", "state_bytes", "compute_bytes", "output_bytes"}
    for part, n_bytes in shown["probed"].items():
        assert n_bytes == pytest.approx(device[part], rel=0.001, abs=6000), part


def test_probe_of_a_file_is_shown_as_a_table(
    pico_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["plan", str(pico_gguf), "--n-ctx", "2048", "--probe", "--device", "cpu"]) == 0
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert [line.split()[0] for line in table] == ["predicted", "kv", "state", "compute", "output"]
    assert table[1].endswith("0.00%")


@pytest.mark.parametrize("draft", ["lookup", "mtp"])
def test_guessing_ahead_is_planned_as_it_is_allocated(
    mtp_gguf: Path, capsys: pytest.CaptureFixture[str], draft: str
) -> None:
    command = (str(mtp_gguf), "--n-ctx", "2048", "--parallel", "2", "--device", "cpu")
    plain = plan_json(capsys, *command)["devices"][0]
    shown = plan_json(capsys, *command, "--draft", draft, "--verify")
    rows = {row["part"]: row for row in shown["comparison"]}
    for part in ("weights", "kv", "state", "compute", "output"):
        assert abs(rows[part]["predicted"] - rows[part]["measured"]) < 0.03 * 2**20, part
    (planned,) = shown["devices"]
    assert planned["state_bytes"] == 4 * plain["state_bytes"]  # of three guesses and none
    has_head = draft == "mtp"
    assert (planned["kv_bytes"] > plain["kv_bytes"]) is has_head
    assert (planned["weights_bytes"] > plain["weights_bytes"]) is has_head


def test_suggestion_for_a_model_without_a_head_can_be_typed() -> None:
    with pytest.raises(UsageError, match="nano has no MTP head") as caught:
        invoke(["plan", "nano", "--ram", "200GiB", "--draft", "mtp"])
    assert caught.value.tries == ("nanorun plan --ram 200GiB nano --draft lookup",)


def test_verify_compares_with_what_is_allocated(
    pico_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = plan_json(capsys, str(pico_gguf), "--n-ctx", "2048", "--verify", "--device", "cpu")
    rows = {row["part"]: row for row in shown["comparison"]}
    assert list(rows) == ["weights", "kv", "state", "compute", "output", "CPU total"]
    for part in ("weights", "kv", "state", "compute", "output"):
        # The engine prints MiB with two decimals, once a buffer, and pads tensors of 64 bytes.
        assert abs(rows[part]["predicted"] - rows[part]["measured"]) < 0.03 * 2**20, part
    (planned,), (measured,) = shown["devices"], shown["measured"]
    assert set(measured) == set(planned)
    assert measured["name"] == "CPU"
    assert measured["total_bytes"] >= shown["peak_bytes"]
    assert measured["free_bytes"] == planned["free_bytes"]
    assert shown["max_error"] == max(row["error"] for row in shown["comparison"])
    assert 0 < shown["proportional_bytes"] <= shown["resident_bytes"] <= shown["peak_bytes"]
    assert shown["measured_decode_tps"] > 0
