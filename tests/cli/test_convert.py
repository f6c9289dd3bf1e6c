"""`nanorun convert`: its output, its flags and its exit codes, as people and scripts meet them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanorun.cli.commands.convert import parse_type_map
from nanorun.errors import ExitCode, UsageError
from nanorun.model.gguf import read_gguf
from tests.support.hub_server import REPOSITORY, serve_hub
from tests.support.source_models import Tensors, write_source_model
from tests.support.waiting import PATIENCE_S

KEYS = {
    "path", "bytes", "n_tensors", "n_params", "bpw", "recipe", "types", "padding", "seconds",
    "peak_rss_bytes", "resumed", "notes",
}  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source_model(tmp_path / "source")


def nanorun(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nanorun", "convert", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S)


def test_conversion_prints_what_each_role_became_and_why(source: Path, tmp_path: Path) -> None:
    run = nanorun(source, "--recipe", "q4_0", "--type-map", "output=q8_0", cwd=tmp_path)
    assert run.returncode == ExitCode.OK
    assert run.stderr == ""
    size = read_gguf(tmp_path / "source-q4_0.gguf").file_bytes
    first, _, *rows = run.stdout.splitlines()
    assert first.startswith("source-q4_0.gguf took ")
    assert f"({size:,} bytes)" in first
    by_role = {row.split()[0]: [*row.split()[1:3], row.split("  ")[-1].strip()] for row in rows}
    assert by_role["expert_up"] == ["q4_0", "2", "recipe q4_0"]
    assert by_role["output"] == ["q8_0", "1", "type map output=q8_0"]
    assert by_role["norm"][0] == "f32"


def test_json_is_one_object_with_the_keys_of_the_contract(source: Path, tmp_path: Path) -> None:
    run = nanorun(source, "--json", "--out", "model.gguf", cwd=tmp_path)
    result = json.loads(run.stdout)
    assert result.keys() == KEYS
    assert result["path"] == "model.gguf"
    assert result["bytes"] == (tmp_path / "model.gguf").stat().st_size
    assert result["types"]["q8_0"] > 10
    assert result["resumed"] is False
    assert result["notes"] == []


def test_field_that_nobody_understands_can_be_passed_over_and_is_written_down(
    tmp_path: Path,
) -> None:
    source = write_source_model(tmp_path / "source", config={"new_norm": "deep", "z_loss": 0.5})
    refused = nanorun(source, "--recipe", "bf16", "--out", "a.gguf", cwd=tmp_path)
    assert refused.returncode == ExitCode.MODEL
    assert "config.json: new_norm: this field is not understood" in refused.stderr
    command = shlex.split(refused.stderr.rpartition("try: ")[2])
    assert command[:2] == ["nanorun", "convert"]
    made = nanorun(*command[2:], "--json", cwd=tmp_path)
    note = f"{source / 'config.json'}: z_loss=0.5: passed over, as --ignore-field says"
    assert f"nanorun: {note}\n" in made.stderr
    assert note in json.loads(made.stdout)["notes"]
    written = read_gguf(tmp_path / "a.gguf").metadata["nanorun.ignored_fields"]
    assert written == ['new_norm="deep"', "z_loss=0.5"]
    again = nanorun("a.gguf", "--out", "b.gguf", cwd=tmp_path)
    assert again.returncode == ExitCode.OK, again.stderr
    assert read_gguf(tmp_path / "b.gguf").metadata["nanorun.ignored_fields"] == written


@pytest.mark.parametrize(
    ("name", "reason"),
    [("no_such_field", "there is no such field"), ("hidden_size", "this field is understood")],
)
def test_only_a_field_that_is_not_understood_can_be_passed_over(
    name: str, reason: str, source: Path, tmp_path: Path
) -> None:
    refused = nanorun(source, "--ignore-field", name, cwd=tmp_path)
    assert refused.returncode == ExitCode.USAGE
    assert f"--ignore-field {name}: {reason}" in refused.stderr


def test_dry_run_writes_nothing_and_names_the_exact_size(source: Path, tmp_path: Path) -> None:
    predicted = nanorun(source, "--dry-run", "--json", cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    made = nanorun(source, "--json", cwd=tmp_path)
    assert json.loads(predicted.stdout)["bytes"] == json.loads(made.stdout)["bytes"]
    text = nanorun(source, "--dry-run", "--force", cwd=tmp_path).stdout
    assert text.startswith("source-q8_0.gguf would be ")


def test_existing_file_is_kept_unless_forced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    out.write_bytes(b"old")
    refused = nanorun(source, "--out", out, cwd=tmp_path)
    assert refused.returncode == ExitCode.USAGE
    assert refused.stdout == ""
    assert refused.stderr.startswith(
        f"nanorun: error: {out} exists already\n  try: nanorun convert"
    )
    assert out.read_bytes() == b"old"
    assert nanorun(source, "--out", out, "--force", cwd=tmp_path).returncode == ExitCode.OK


def test_pico_is_a_source_by_name(tmp_path: Path) -> None:
    run = nanorun("pico", "--recipe", "q4_0", "--json", cwd=tmp_path)
    assert json.loads(run.stdout)["path"] == "pico-q4_0.gguf"


def spoil(tensors: Tensors) -> None:
    tensors["lm_head.weight"][0, 0] = float("nan")


def truncate(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["nowhere"], ExitCode.MODEL, "nowhere: expected the folder of a source model"),
        (["nano"], ExitCode.FAILURE, "A3B-BF16 cannot be read from https://huggingface.co"),
        (["nvidia/x@v1"], ExitCode.FAILURE, "HF_HUB_OFFLINE is set"),
        (["x.gguf"], ExitCode.MODEL, "x.gguf: No such file"),
        (["source", "--recipe", "q9"], ExitCode.USAGE, "there is no recipe 'q9'"),
        (["source", "--recipe", "q4_k"], ExitCode.USAGE, "q4_k stores blocks of 256"),
        (["source", "--type-map", "expert_up"], ExitCode.USAGE, "not of the form ROLE=TYPE"),
        (["source", "--type-map", "experts=q8_0"], ExitCode.USAGE, "there is no role 'experts'"),
        (["source", "--out", "a/b.gguf"], ExitCode.USAGE, "there is no folder a"),
        (["source", "--threads", "0"], ExitCode.USAGE, "--threads"),
        ([], ExitCode.USAGE, "SRC"),
    ],
)
def test_request_that_cannot_be_met_is_explained(
    args: list[str], code: ExitCode, message: str, source: Path, tmp_path: Path
) -> None:
    run = nanorun(*args, cwd=tmp_path)
    assert run.returncode == code
    assert run.stderr.startswith("nanorun: error: ")
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_damaged_source_is_exit_code_3_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    truncate(source)
    run = nanorun(source, cwd=tmp_path)
    assert run.returncode == ExitCode.MODEL
    assert "model.safetensors: expected a file of" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nan_is_exit_code_3_and_names_the_tensor(tmp_path: Path) -> None:
    write_source_model(tmp_path / "source", edit=spoil)
    run = nanorun("source", cwd=tmp_path)
    assert run.returncode == ExitCode.MODEL
    assert "tensor 'lm_head.weight': 1 of" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["~nobody_of_this_name/model", "a" * 300])
def test_source_of_an_impossible_name_is_refused(name: str, tmp_path: Path) -> None:
    run = nanorun(name, cwd=tmp_path)
    assert run.returncode == ExitCode.MODEL
    assert run.stderr.startswith("nanorun: error:")
    assert "cannot be opened: " in run.stderr


def test_missing_gguf_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    run = nanorun("models/nano.gguf", cwd=tmp_path)
    assert (run.returncode, run.stderr) == (
        ExitCode.MODEL, "nanorun: error: models/nano.gguf: No such file or directory\n",
    )  # fmt: skip


def test_ctrl_c_on_a_terminal_is_exit_code_130_and_can_be_gone_on_from(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    write_source_model(
        tmp_path / "source", pattern="ME" * 8, hidden_size=512, moe_intermediate_size=512
    )
    (tmp_path / "source-iq4_nl-old.gguf.part").write_bytes(b"of another conversion")
    terminal, theirs = pty.openpty()
    command = [sys.executable, "-m", "nanorun", "convert", "source", "--recipe", "iq4_nl"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while b".weight" not in shown:
            shown += os.read(terminal, 1000)
        process.send_signal(signal.SIGINT)
        while chunk := read_terminal(terminal):
            shown += chunk
        stdout, _ = process.communicate(timeout=PATIENCE_S)
    os.close(terminal)
    assert process.returncode == ExitCode.INTERRUPTED
    assert b"stopped; source-iq4_nl.gguf was not written" in shown
    assert b"the same command goes on from source-iq4_nl.gguf.part;" in shown
    assert stdout == b""
    assert not (tmp_path / "source-iq4_nl.gguf").exists()
    again = nanorun("source", "--recipe", "iq4_nl", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["resumed"] is True
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["source-iq4_nl.gguf"]


def read_terminal(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1000)
    except OSError:  # Linux says so when the other side is closed.
        return b""


def test_size_of_a_split_is_kept_and_predicted(source: Path, tmp_path: Path) -> None:
    args = (source, "--split-max-size", "200KiB", "--json")
    predicted = json.loads(nanorun(*args, "--dry-run", cwd=tmp_path).stdout)
    made = json.loads(nanorun(*args, cwd=tmp_path).stdout)
    files = sorted(tmp_path.glob("*.gguf"))
    assert made["path"] == predicted["path"] == files[0].name
    assert files[0].name == f"source-q8_0-00001-of-{len(files):05}.gguf"
    assert len(files) > 1
    assert all(path.stat().st_size <= 200 * 1024 for path in files)
    assert made["bytes"] == predicted["bytes"] == sum(path.stat().st_size for path in files)


def test_source_that_changed_is_started_anew_and_said(tmp_path: Path) -> None:
    source = write_source_model(tmp_path / "source")
    (tmp_path / "source-q8_0.gguf.part").write_bytes(b"a start")
    (tmp_path / "source-q8_0.gguf.part.json").write_text('{"fingerprint": "another"}\n')
    run = nanorun(source, cwd=tmp_path)
    assert run.returncode == ExitCode.OK
    assert run.stderr == (
        "nanorun: source-q8_0.gguf.part: the source or the recipe is another than it was:"
        " starting anew\n"
    )


def test_repository_on_the_hub_is_a_source_by_name(tmp_path: Path) -> None:
    source = write_source_model(tmp_path / "source", n_shards=2)
    (tmp_path / "work").mkdir()
    with serve_hub(source) as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "nanorun", "convert", f"{REPOSITORY}@main", "--json"]
        run = subprocess.run(
            command, cwd=tmp_path / "work", capture_output=True, text=True, timeout=PATIENCE_S,
            env={**os.environ, **environment},
        )  # fmt: skip
    assert run.stderr == ""
    assert json.loads(run.stdout)["path"] == "Tiny-q8_0.gguf"
    metadata = read_gguf(tmp_path / "work" / "Tiny-q8_0.gguf").metadata
    assert metadata["nanorun.source.repository"] == REPOSITORY


def test_gguf_is_a_source(source: Path, tmp_path: Path) -> None:
    nanorun(source, "--recipe", "bf16", "--out", "a.gguf", cwd=tmp_path)
    run = nanorun("a.gguf", "--recipe", "q4_0", "--json", cwd=tmp_path)
    # Named after the model, which the file knows of.
    assert json.loads(run.stdout)["path"] == "source-q4_0.gguf"


def test_dry_run_needs_no_weights(tmp_path: Path) -> None:
    source = write_source_model(tmp_path / "source", n_shards=3, mtp=True)
    whole = json.loads(nanorun(source, "--dry-run", "--json", cwd=tmp_path).stdout)
    for path in source.glob("*.safetensors"):
        path.unlink()
    assert (
        json.loads(nanorun(source, "--dry-run", "--json", cwd=tmp_path).stdout)["bytes"]
        == whole["bytes"]
    )
    (source / "tokenizer.json").unlink()
    said = nanorun(source, "--dry-run", cwd=tmp_path)
    assert said.returncode == ExitCode.OK
    assert said.stdout.splitlines()[1].startswith("without tokenizer.json, which is not there")
    assert nanorun(source, cwd=tmp_path).returncode == ExitCode.MODEL


def test_type_map_takes_several_entries_in_one() -> None:
    entries = ["expert_up=mxfp4,expert_down=mxfp4", " *=q8_0"]
    expected = {"expert_up": "mxfp4", "expert_down": "mxfp4", "*": "q8_0"}
    assert parse_type_map(entries) == expected


@pytest.mark.parametrize("entries", [["=q8_0"], ["output="], ["output"], [""], ["a=q8_0", "a=f16"]])
def test_type_map_of_another_form_is_refused(entries: list[str]) -> None:
    with pytest.raises(UsageError, match="--type-map"):
        parse_type_map(entries)


def test_quantizer_is_named_in_the_file_and_in_what_is_printed(
    source: Path, tmp_path: Path
) -> None:
    made = {}
    for name in ("ggml", "auto", "torch"):
        flags = ("--recipe", "iq4_nl", "--quantizer", name, "--out", f"{name}.gguf")
        run = nanorun(source, *flags, cwd=tmp_path)
        assert run.returncode == ExitCode.OK, run.stderr
        gguf = read_gguf(tmp_path / f"{name}.gguf")
        made[name] = (gguf.metadata["nanorun.quantizer"], gguf.path.read_bytes()[-20_000:])
        assert ("quantized by torch" in run.stdout) is (name == "torch")
    # Where no GPU is, the bytes stay ggml's unless torch is asked for.
    assert made["auto"] == made["ggml"]
    assert made["ggml"][0] == "ggml"
    assert made["torch"][0].startswith("torch ")
    assert made["torch"][1] != made["ggml"][1]


def test_conversion_by_another_quantizer_starts_anew(source: Path, tmp_path: Path) -> None:
    from nanorun_converters.convert import ConvertOptions, convert

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    options = ConvertOptions(out=tmp_path / "m.gguf", recipe="iq4_nl", quantizer="torch")
    with pytest.raises(KeyboardInterrupt):
        convert(source, options, stop)
    run = nanorun(source, "--recipe", "iq4_nl", "--out", "m.gguf", "--json", cwd=tmp_path)
    assert json.loads(run.stdout)["resumed"] is False
    assert "starting anew" in run.stderr


def test_unknown_quantizer_is_a_usage_error(source: Path, tmp_path: Path) -> None:
    run = nanorun(source, "--quantizer", "magic", cwd=tmp_path)
    assert run.returncode == ExitCode.USAGE
    assert "there is no quantizer 'magic'" in run.stderr
