"""Whole conversions: what comes out, what is predicted, and that nothing is left when they fail."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from nanorun.errors import ExitCode, ModelError, NanorunError, UsageError
from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import GgufFile, read_gguf
from nanorun.model.gguf_arch import arch_from_gguf
from nanorun.model.tensor_roles import check_tensors, expected_tensors
from nanorun_converters import convert as convert_module
from nanorun_converters.convert import ConvertOptions, ConvertProgress, convert
from nanorun_converters.family.config import arch_from_config
from nanorun_quant.writable_types import QUANTIZERS
from tests.converters.transformers_reference import engine_logits
from tests.support.source_models import Tensors, write_source_model
from tests.support.waiting import PATIENCE_S, little_work

# Types whose blocks of 32 divide every row of the default source model.
FITTING = [t for t in QUANTIZERS if t.block_size <= 32]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source_model(tmp_path / "source")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "model.gguf"


@pytest.fixture(autouse=True)
def output_folder(out: Path) -> None:
    out.parent.mkdir()


def converted(source: Path, out: Path, recipe: str = "q8_0", **type_map: str) -> GgufFile:
    convert(source, ConvertOptions(out=out, recipe=recipe, type_map=type_map))
    return read_gguf(out)


def nothing_left(out: Path) -> bool:
    return not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("pattern", "sizes"),
    [
        ("ME*E", {}),
        ("M-*-", {}),
        ("EM*ME", {"moe_latent_size": 32}),
        ("*ME", {"n_group": 2, "topk_group": 1}),
    ],
    ids=["moe", "dense", "latent", "groups"],
)
def test_file_describes_the_model_and_holds_all_of_it(
    pattern: str, sizes: dict[str, int], tmp_path: Path, out: Path
) -> None:
    folder = write_source_model(tmp_path / "source", pattern=pattern, **sizes)
    gguf = converted(folder, out)
    arch = arch_from_gguf(gguf)
    config = json.loads((folder / "config.json").read_text())
    assert arch == arch_from_config(config, "config.json")
    assert arch.pattern == pattern
    check_tensors(gguf, arch)
    assert list(gguf.tensors) == list(expected_tensors(arch))


@pytest.mark.parametrize("type_", FITTING, ids=lambda type_: type_.label)
def test_engine_runs_every_type(type_: GgmlType, source: Path, out: Path) -> None:
    gguf = converted(source, out, type_.label)
    assert gguf.tensors["token_embd.weight"].type is type_
    logits = engine_logits(out, list(range(32, 64)))
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1


def test_provenance_is_in_plain_view(source: Path, out: Path) -> None:
    gguf = converted(source, out, "q4_0", expert_up="mxfp4")
    metadata = gguf.metadata
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert metadata["nanorun.layer_pattern"] == "ME*E"
    assert metadata["nanorun.recipe"] == "q4_0"
    assert metadata["nanorun.recipe_version"] == 1
    assert metadata["nanorun.source.repository"] == "source"
    assert metadata["nanorun.source.files"] == ["model.safetensors"]
    assert metadata["nanorun.source.sha256"] == [digest]
    assert metadata["nanorun.padding"] == []
    by_role = dict(entry.split("=") for entry in metadata["nanorun.bytes_by_role"])
    assert sum(map(int, by_role.values())) == sum(t.n_bytes for t in gguf.tensors.values())
    assert int(by_role["expert_up"]) == 2 * 4 * 64 * 96 // 32 * 17


def test_keys_that_llama_cpp_reads_are_there(source: Path, out: Path) -> None:
    metadata = converted(source, out).metadata
    assert metadata["general.architecture"] == "nemotron_h_moe"
    assert metadata["general.file_type"] == 7
    assert metadata["general.quantization_version"] == 2
    assert metadata["nemotron_h_moe.feed_forward_length"] == [0, 64, 0, 64]
    assert metadata["nemotron_h_moe.attention.head_count_kv"] == [0, 0, 1, 0]
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.chat_template"] == (source / "chat_template.jinja").read_text()


def test_sampling_of_the_generation_config_is_kept(source: Path, out: Path) -> None:
    generation = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": "much"}
    (source / "generation_config.json").write_text(json.dumps(generation))
    metadata = converted(source, out).metadata
    assert metadata["general.sampling.temp"] == pytest.approx(0.6)
    assert metadata["general.sampling.top_p"] == pytest.approx(0.95)
    assert metadata["general.sampling.top_k"] == 20
    assert "general.sampling.min_p" not in metadata


def test_result_says_what_was_made(source: Path, out: Path) -> None:
    result = convert(source, ConvertOptions(out=out, recipe="q4_0", type_map={"output": "f16"}))
    gguf = read_gguf(out)
    assert dataclasses.asdict(result).keys() == {
        "path", "bytes", "n_tensors", "n_params", "bpw", "recipe", "types", "padding", "seconds",
        "peak_rss_bytes", "resumed", "notes",
    }  # fmt: skip
    assert (result.path, result.bytes) == (str(out), out.stat().st_size)
    assert (result.n_tensors, result.n_params) == (len(gguf.tensors), gguf.n_params)
    n_bytes = sum(t.n_bytes for t in gguf.tensors.values())
    assert result.bpw == pytest.approx(8 * n_bytes / gguf.n_params, abs=1e-4)
    assert result.types["f16"] == 1
    assert sum(result.types.values()) == result.n_tensors
    assert result.peak_rss_bytes > 10 * 2**20


@pytest.mark.parametrize("recipe", ["f32", "bf16", "q8_0", "mxfp4"])
def test_dry_run_predicts_the_file_to_the_byte(recipe: str, source: Path, out: Path) -> None:
    predicted = convert(source, ConvertOptions(out=out, recipe=recipe, dry_run=True))
    assert nothing_left(out)
    made = convert(source, ConvertOptions(out=out, recipe=recipe))
    assert predicted.bytes == made.bytes == out.stat().st_size
    assert (predicted.types, predicted.bpw) == (made.types, made.bpw)


def test_one_file_shards_and_stacks_give_the_same_tensors(tmp_path: Path, out: Path) -> None:
    def data_of(folder: Path, name: str) -> bytes:
        gguf = converted(folder, out.with_name(name), "q8_0")
        return gguf.path.read_bytes()[gguf.data_offset :]

    one = write_source_model(tmp_path / "one")
    shards = write_source_model(tmp_path / "shards", n_shards=3)
    assert data_of(one, "one.gguf") == data_of(shards, "shards.gguf")


@pytest.mark.parametrize("n_threads", [1, 5])
@pytest.mark.parametrize("piece_elements", [1, 1000, 2**20])
def test_threads_and_pieces_do_not_change_the_file(
    n_threads: int, piece_elements: int, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, ConvertOptions(out=out.with_name("expected.gguf"), recipe="iq4_nl"))
    monkeypatch.setattr(convert_module, "PIECE_ELEMENTS", piece_elements)
    convert(source, ConvertOptions(out=out, recipe="iq4_nl", n_threads=n_threads))
    assert out.read_bytes() == out.with_name("expected.gguf").read_bytes()


def test_progress_runs_from_first_to_last_byte(source: Path, out: Path) -> None:
    seen: list[ConvertProgress] = []
    convert(source, ConvertOptions(out=out), seen.append)
    done = [progress.n_bytes_done for progress in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].n_bytes
    assert (seen[0].tensor, seen[-1].tensor) == ("token_embd.weight", "output.weight")


def test_default_name_is_that_of_source_and_recipe(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert convert(source, ConvertOptions(recipe="q4_0")).path == "source-q4_0.gguf"
    assert (tmp_path / "source-q4_0.gguf").is_file()


def test_folder_as_output_takes_the_default_name(source: Path, out: Path) -> None:
    convert(source, ConvertOptions(out=out.parent))
    assert [path.name for path in out.parent.iterdir()] == ["source-q8_0.gguf"]


def test_existing_file_is_kept_unless_forced(source: Path, out: Path) -> None:
    out.write_bytes(b"precious")
    with pytest.raises(UsageError) as caught:
        convert(source, ConvertOptions(out=out))
    assert caught.value.message == f"{out} exists already"
    assert caught.value.tries == (f"nanorun convert {source} --out {out} --force",)
    assert out.read_bytes() == b"precious"
    convert(source, ConvertOptions(out=out, force=True))
    assert read_gguf(out).tensors


def test_suggested_command_asks_for_the_same(source: Path, out: Path) -> None:
    out.write_bytes(b"precious")
    types = {"expert_up": "q5_0"}
    options = ConvertOptions(out=out, recipe="q4_0", type_map=types, keep_mtp=False)
    with pytest.raises(UsageError) as caught:
        convert(source, options)
    flags = f"--recipe q4_0 --no-mtp --out {out} --force --type-map expert_up=q5_0"
    assert caught.value.tries == (f"nanorun convert {source} {flags}",)


def test_output_of_an_impossible_name_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="file name too long"):
        convert(source, ConvertOptions(out=tmp_path / ("a" * 300)))


def test_bits_per_weight_without_end_are_refused(source: Path) -> None:
    with pytest.raises(UsageError, match="--target-bpw inf"):
        convert(source, ConvertOptions(target_bpw=math.inf))


def test_missing_output_folder_is_refused(source: Path, out: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        convert(source, ConvertOptions(out=out.parent / "deeper" / "model.gguf"))


def test_block_that_does_not_fit_is_refused_with_the_command_that_does(
    source: Path, out: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        convert(source, ConvertOptions(out=out, recipe="q4_k"))
    assert caught.value.tries == (f"nanorun convert {source} --recipe q4_0 --out {out}",)
    assert nothing_left(out)


def test_suggestion_of_another_recipe_keeps_all_else_but_the_type_map(
    source: Path, out: Path
) -> None:
    options = ConvertOptions(out=out, type_map={"*": "q4_k"}, pad="never", keep_mtp=False)
    with pytest.raises(UsageError) as caught:
        convert(source, options)
    flags = f"--recipe q4_0 --pad never --no-mtp --out {out}"
    assert caught.value.tries == (f"nanorun convert {source} {flags}",)


@pytest.mark.parametrize("recipe", ["f32", "q8_0"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["layers.1.mixer.experts.3.up_proj.weight", "layers.0.mixer.D"])
def test_number_that_is_not_finite_is_refused_by_tensor(
    name: str, value: float, recipe: str, tmp_path: Path, out: Path
) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"backbone.{name}"].flat[-1] = value

    folder = write_source_model(tmp_path / "bad", edit=spoil, dtype="F32")
    with pytest.raises(ModelError) as caught:
        convert(folder, ConvertOptions(out=out, recipe=recipe))
    assert f"model.safetensors: tensor 'backbone.{name}'" in caught.value.message
    assert "not finite" in caught.value.message
    assert nothing_left(out)


def test_decay_that_overflows_is_refused_by_tensor(tmp_path: Path, out: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["backbone.layers.0.mixer.A_log"][0] = 100.0

    folder = write_source_model(tmp_path / "bad", edit=spoil)
    with pytest.raises(ModelError, match=r"A_log': 1 of 4 elements are not finite"):
        convert(folder, ConvertOptions(out=out))


def test_number_too_large_for_f16_is_refused_by_tensor(tmp_path: Path, out: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["lm_head.weight"][0, 0] = 1e5

    folder = write_source_model(tmp_path / "bad", edit=spoil)
    with pytest.raises(ModelError, match=r"lm_head\.weight.* is beyond the 65504"):
        convert(folder, ConvertOptions(out=out, recipe="f16"))
    convert(folder, ConvertOptions(out=out, recipe="bf16"))


def test_file_that_changes_during_the_conversion_is_refused(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "PIECE_ELEMENTS", 1000)
    path = source / "model.safetensors"

    def cut(progress: ConvertProgress) -> None:
        os.truncate(path, 5000)

    # A thread that was reading meets the end; one that had read what is left sees the other time.
    refused = r"model\.safetensors(: expected \d+ bytes| was changed while it was read)"
    with pytest.raises(ModelError, match=refused):
        convert(source, ConvertOptions(out=out, n_threads=1), cut)
    assert nothing_left(out)


def test_file_that_is_exchanged_during_the_conversion_is_refused(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "PIECE_ELEMENTS", 1000)
    path = source / "model.safetensors"

    def exchange(progress: ConvertProgress) -> None:
        copy = path.with_name("copy")
        copy.write_bytes(path.read_bytes())
        copy.replace(path)

    with pytest.raises(ModelError, match=r"model\.safetensors was changed while it was read"):
        convert(source, ConvertOptions(out=out, n_threads=1), exchange)
    assert nothing_left(out)


def test_small_files_are_read_once(source: Path, out: Path) -> None:
    def change(progress: ConvertProgress) -> None:
        (source / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 7}')

    convert(source, ConvertOptions(out=out), change)
    assert "general.sampling.temp" not in read_gguf(out).metadata


def test_source_that_is_away_for_a_while_can_be_gone_on_with(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "PIECE_ELEMENTS", 1000)
    monkeypatch.setattr("nanorun_converters.output.files.SYNC_BYTES", 1)
    away = source.with_name("away")

    def unmount(progress: ConvertProgress) -> None:
        if source.exists():
            source.rename(away)

    with pytest.raises(ModelError, match="No such file"):
        convert(source, ConvertOptions(out=out, n_threads=1), unmount)
    away.rename(source)
    assert convert(source, ConvertOptions(out=out)).resumed


def test_failure_in_the_progress_callback_leaves_nothing(source: Path, out: Path) -> None:
    def fail(progress: ConvertProgress) -> None:
        raise RuntimeError("closed window")

    with pytest.raises(RuntimeError, match="closed window"):
        convert(source, ConvertOptions(out=out), fail)
    assert nothing_left(out)


def test_disk_too_small_is_said_before_anything_is_written(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(NanorunError, match="but the disk has") as caught:
        convert(source, ConvertOptions(out=out))
    assert caught.value.exit_code is ExitCode.FAILURE
    assert nothing_left(out)


def test_disk_that_fills_up_leaves_nothing(source: Path, out: Path) -> None:
    """A limit on the size of files stands for a disk that is full in the middle of the work."""
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        with pytest.raises(NanorunError) as caught:
            convert(source, ConvertOptions(out=out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    reason = os.strerror(errno.EFBIG).lower()
    assert caught.value.message == f"{out} cannot be written: {reason}"
    assert nothing_left(out)


CONVERT = """
import sys, time
from pathlib import Path
from nanorun_converters.convert import ConvertOptions, convert

def progress(p):
    print(p.tensor, flush=True)
    time.sleep(0.02)

convert(Path(sys.argv[1]), ConvertOptions(out=Path(sys.argv[2])), progress)
"""


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
def test_ctrl_c_keeps_what_the_same_command_can_go_on_with(source: Path, out: Path) -> None:
    command = [sys.executable, "-c", CONVERT, str(source), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in stderr
    names = sorted(path.name for path in out.parent.iterdir())
    assert names == ["model.gguf.part", "model.gguf.part.json"]
    assert convert(source, ConvertOptions(out=out)).resumed


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
def test_killed_conversion_leaves_no_file_that_looks_whole(source: Path, out: Path) -> None:
    command = [sys.executable, "-c", CONVERT, str(source), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline()
        process.kill()
    assert not out.exists()
    convert(source, ConvertOptions(out=out))
    assert [path.name for path in out.parent.iterdir()] == ["model.gguf"]


MEASURE = """
import sys
from pathlib import Path
from nanorun_converters.convert import ConvertOptions, convert

result = convert(Path(sys.argv[1]), ConvertOptions(out=Path(sys.argv[2]), n_threads=2))
print(result.peak_rss_bytes, result.bytes)
"""


def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path, out: Path) -> None:
    peaks, sizes = [], []
    for n_layer in (4, 16):
        folder = write_source_model(
            tmp_path / f"layers{n_layer}", pattern="ME" * (n_layer // 2), hidden_size=512,
            moe_intermediate_size=512, n_routed_experts=8,
        )  # fmt: skip
        command = [sys.executable, "-c", MEASURE, str(folder), str(out.with_name(folder.name))]
        found = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        peak, size = map(int, found.split())
        peaks.append(peak)
        sizes.append(size)
    grown = sizes[1] - sizes[0]
    assert grown > 25 * 2**20
    assert peaks[1] - peaks[0] < grown / 8


def test_conversion_needs_neither_torch_nor_safetensors(source: Path, out: Path) -> None:
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from nanorun_converters.convert import ConvertOptions, convert
        convert(Path(sys.argv[1]), ConvertOptions(out=Path(sys.argv[2])))
        print(sorted({"torch", "safetensors", "transformers", "llama_cpp"} & sys.modules.keys()))
        """
    )
    command = [sys.executable, "-c", script, str(source), str(out)]
    found = subprocess.run(command, capture_output=True, check=True, text=True)
    assert found.stdout == "[]\n"


def test_pico_converts_in_seconds(pico_source: Path, out: Path) -> None:
    with little_work(cpu_s=60):
        convert(pico_source, ConvertOptions(out=out, recipe="iq4_nl"))


def test_head_that_is_not_there_is_left_out_and_said(tmp_path: Path, out: Path) -> None:
    folder = write_source_model(tmp_path / "saved_again", config={"num_nextn_predict_layers": 1})
    result = convert(folder, ConvertOptions(out=out))
    note = (
        f"{folder / 'config.json'}: num_nextn_predict_layers: there are no mtp.* weights; left out"
    )
    assert result.notes == (note,)
    assert arch_from_gguf(read_gguf(out)).n_layer_nextn == 0


def test_head_of_which_a_part_is_missing_is_refused(tmp_path: Path, out: Path) -> None:
    def drop(tensors: Tensors) -> None:
        del tensors["mtp.layers.0.enorm.weight"]

    folder = write_source_model(tmp_path / "damaged", mtp=True, edit=drop)
    with pytest.raises(ModelError, match=r"mtp\.layers\.0\.enorm\.weight.*found no such tensor"):
        convert(folder, ConvertOptions(out=out))
