"""A conversion that is cut short goes on where it stopped, and ends in the same file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nanorun.errors import ModelError
from nanorun_converters import convert as convert_module
from nanorun_converters.conversion_plan import plan_conversion
from nanorun_converters.convert import ConvertOptions, ConvertProgress, ConvertResult, convert
from nanorun_converters.output import files as output_module
from nanorun_converters.output import journal as journal_module
from nanorun_quant.imatrix import Imatrix
from tests.support.source_models import write_json, write_source_model

# Notes every piece, and is slow, so that a kill finds it somewhere in the middle.
SLOW = """
import sys, time
from pathlib import Path
from nanorun_converters import convert as module
from nanorun_converters.output import files as output
output.SYNC_BYTES = 1
module.PIECE_ELEMENTS = 3000

def progress(p):
    print(p.n_bytes_done, flush=True)
    time.sleep(0.005)

options = module.ConvertOptions(
    out=Path(sys.argv[2]), recipe=sys.argv[3], split_max_bytes=int(sys.argv[4]) or None
)
print(module.convert(Path(sys.argv[1]), options, progress).resumed)
"""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, pressed by the test."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source_model(tmp_path / "source")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_module, "SYNC_BYTES", 1)
    monkeypatch.setattr(convert_module, "PIECE_ELEMENTS", 3000)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model.gguf"


def part_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


def journal_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.part.json")


def stop_after(n_pieces: int, source: Path, out: Path, **options: object) -> None:
    """Convert, and press Ctrl-C after some pieces."""
    left = n_pieces

    def progress(_: ConvertProgress) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Stopped

    with pytest.raises(Stopped):
        convert(source, ConvertOptions(out=out, **options), progress)  # type: ignore[arg-type]


def finish(source: Path, out: Path, **options: object) -> tuple[ConvertResult, int]:
    """Convert to the end; also how many bytes were there when it started."""
    seen: list[int] = []
    result = convert(
        source,
        ConvertOptions(out=out, **options),  # type: ignore[arg-type]
        lambda progress: seen.append(progress.n_bytes_done),
    )
    return result, seen[0] if seen else 0


def files(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.parent.iterdir()}


def expected_files(source: Path, out: Path, **options: object) -> dict[str, str]:
    folder = out.parent.with_name("whole")
    folder.mkdir(exist_ok=True)
    finish(source, folder / out.name, **options)
    return files(folder / out.name)


@pytest.mark.parametrize("n_pieces", [1, 7, 40])
@pytest.mark.parametrize("split_max_bytes", [None, 120_000])
def test_stopped_conversion_goes_on_where_it_stopped(
    n_pieces: int, split_max_bytes: int | None, source: Path, out: Path
) -> None:
    stop_after(n_pieces, source, out, split_max_bytes=split_max_bytes)
    assert not [path for path in out.parent.iterdir() if path.suffix == ".gguf"]
    result, first = finish(source, out, split_max_bytes=split_max_bytes)
    assert result.resumed
    assert first > 1000 * n_pieces
    assert files(out) == expected_files(source, out, split_max_bytes=split_max_bytes)


def test_stop_at_every_piece_ends_in_the_same_file(source: Path, out: Path) -> None:
    n_stops = 0
    while True:
        try:
            stop_after(5, source, out)
        except pytest.fail.Exception:
            break  # it came to its end
        n_stops += 1
    assert n_stops > 10
    assert files(out) == expected_files(source, out)


def test_stop_before_the_first_piece_leaves_nothing(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise Stopped

    monkeypatch.setattr("nanorun_quant.encode.load_ggml", stop)
    with pytest.raises(Stopped):
        convert(source, ConvertOptions(out=out))
    assert not list(out.parent.iterdir())


def test_stop_while_the_start_is_checked_keeps_it(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(20, source, out)

    def stop(*_: object) -> None:
        raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(output_module, "_crc_of", stop)
        convert(source, ConvertOptions(out=out))
    assert finish(source, out)[1] > 20_000


def test_stop_while_the_journal_is_written_anew_keeps_the_old_one(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(20, source, out)

    def stop(*_: object) -> None:
        raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(journal_module, "_fields", stop)
        convert(source, ConvertOptions(out=out))
    assert finish(source, out)[1] > 20_000
    assert files(out) == expected_files(source, out)


def test_stop_between_the_names_of_a_split_can_be_gone_on_from(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, left = Path.replace, 2

    def stop_at_the_second(path: Path, target: Path) -> Path:
        nonlocal left
        left -= target.suffix == ".gguf"
        if not left:
            raise Stopped
        return replace(path, target)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Path, "replace", stop_at_the_second)
        convert(source, ConvertOptions(out=out, split_max_bytes=120_000))
    assert [path for path in out.parent.iterdir() if path.suffix == ".gguf"]
    result, first = finish(source, out, split_max_bytes=120_000)
    assert result.resumed
    assert not first  # all of the data was there
    assert files(out) == expected_files(source, out, split_max_bytes=120_000)


def test_hash_that_was_known_before_the_stop_is_not_computed_again(source: Path, out: Path) -> None:
    stop_after(40, source, out)
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    lines = [json.loads(line) for line in journal_of(out).read_text().splitlines()]
    assert {"file": "model.safetensors", "sha256": digest} in lines


CHANGES = {
    "weights": lambda source: write_source_model(source, seed=1),
    "config": lambda source: write_json(source / "generation_config.json", {"temperature": 0.5}),
    "template": lambda source: (source / "chat_template.jinja").write_text("{{ other }}"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_source_starts_anew_and_says_so(
    what: str, source: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop_after(20, source, out)
    CHANGES[what](source)
    result, first = finish(source, out)
    assert not result.resumed
    assert first <= 3000 * 2
    assert "starting anew" in caplog.text
    assert files(out) == expected_files(source, out)


@pytest.mark.parametrize("changed", [{"recipe": "q4_0"}, {"split_max_bytes": 120_000}])
def test_changed_recipe_starts_anew_and_says_so(
    changed: dict[str, object], source: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop_after(20, source, out)
    result, _ = finish(source, out, **changed)
    assert not result.resumed
    if "recipe" in changed:  # a split file has another name, and so another part
        assert "starting anew" in caplog.text
        assert files(out) == expected_files(source, out, **changed)


def test_other_gram_matrices_are_another_conversion(source: Path, out: Path) -> None:
    layouts = (plan := plan_conversion(source, ConvertOptions(out=out))).lay_out()
    prints = {
        convert_module._fingerprint(
            dataclasses.replace(plan, imatrix=Imatrix(grams=grams)), layouts
        )
        for grams in ({}, {"a": np.eye(2, dtype=np.float32)}, {"b": np.eye(2, dtype=np.float32)})
    }
    assert len(prints) == 3


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def test_damage_in_the_middle_is_found_and_written_again(source: Path, out: Path) -> None:
    stop_after(40, source, out)
    n_bytes = part_of(out).stat().st_size
    flip(part_of(out), n_bytes - n_bytes // 4)
    result, first = finish(source, out)
    assert result.resumed
    assert first < n_bytes - n_bytes // 4
    assert files(out) == expected_files(source, out)


@pytest.mark.parametrize("n_bytes", [0, 100, 60_000])
def test_part_that_a_power_cut_shortened_is_taken_as_far_as_it_is_good(
    n_bytes: int, source: Path, out: Path
) -> None:
    stop_after(40, source, out)
    os.truncate(part_of(out), n_bytes)
    finish(source, out)
    assert files(out) == expected_files(source, out)


JOURNALS = {
    "none": None,
    "empty": b"",
    "garbage": b"\xff\x00{[",
    "a list": b"[]\n",
    "deep": b"[" * 100_000,
    "only a title": b'{"nanorun_journal": 1, "fingerprint": "0"}\n',
}


@pytest.mark.parametrize("content", JOURNALS.values(), ids=list(JOURNALS))
def test_unreadable_journal_starts_anew(content: bytes | None, source: Path, out: Path) -> None:
    stop_after(10, source, out)
    journal_of(out).unlink() if content is None else journal_of(out).write_bytes(content)
    result, _ = finish(source, out)
    assert not result.resumed
    assert files(out) == expected_files(source, out)


@pytest.mark.parametrize(
    "line",
    [
        b'{"i_file": 0, "end"',
        b'{"i_file": 0, "end": 99999999, "crc32": 1, "n_data": 5}\n',
        b'{"i_file": 9, "end": 50000, "crc32": 1, "n_data": 5}\n',
        b'{"i_file": 0, "end": -5, "crc32": 0, "n_data": -5}\n',
        b'{"i_file": null}\n',
        b'{"sha256": "0"}\n',
    ],
)
def test_line_of_the_journal_that_cannot_be_true_is_ignored(
    line: bytes, source: Path, out: Path
) -> None:
    stop_after(10, source, out)
    with journal_of(out).open("ab") as stream:
        stream.write(line)
    result, _ = finish(source, out)
    assert result.resumed
    assert files(out) == expected_files(source, out)


def test_failure_that_would_come_again_leaves_nothing(source: Path, out: Path) -> None:
    stop_after(10, source, out)
    part = part_of(out)
    assert part.exists()

    def fail(_: ConvertProgress) -> None:
        raise ModelError("a number that is not finite")

    with pytest.raises(ModelError):
        convert(source, ConvertOptions(out=out), fail)
    assert not list(out.parent.iterdir())


def kill_and_finish(n_kills: int, source: Path, out: Path, split: int) -> None:
    """Start the same command again and again, kill it each time, and let it finish at last."""
    command = [sys.executable, "-c", SLOW, str(source), str(out), "q8_0", str(split)]
    rng = random.Random(n_kills)
    n_done: list[int] = []
    for _ in range(n_kills):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout
            for _ in range(rng.randrange(1, 6)):
                line = process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        n_done.append(int(line))
        assert not [path for path in out.parent.iterdir() if path.suffix == ".gguf"]
    assert n_done == sorted(n_done)
    finished = subprocess.run(command, capture_output=True, check=True, text=True)
    assert finished.stdout.splitlines()[-1] == "True"


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
def test_killed_conversion_ends_in_the_same_file(source: Path, out: Path) -> None:
    kill_and_finish(3, source, out, split=120_000)
    assert files(out) == expected_files(source, out, split_max_bytes=120_000)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends signals")
def test_conversion_killed_twenty_times_ends_in_the_same_file(source: Path, out: Path) -> None:
    kill_and_finish(20, source, out, split=0)
    assert files(out) == expected_files(source, out)


def test_ctrl_c_in_the_middle_of_a_piece_costs_that_piece(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written but not yet counted: what is noted is what was whole before."""
    options = ConvertOptions(out=tmp_path / "out.gguf", recipe="q8_0")
    monkeypatch.setattr(output_module, "SYNC_BYTES", 1 << 40)
    checksum, n_pieces = output_module.zlib.crc32, 0

    def stopped(data: bytes, value: int = 0) -> int:
        nonlocal n_pieces
        n_pieces += 1
        if n_pieces == 20:
            raise Stopped
        return int(checksum(data, value))

    with monkeypatch.context() as patched:
        patched.setattr(output_module.zlib, "crc32", stopped)
        with pytest.raises(Stopped):
            convert(source, options)
    again = convert(source, options)
    assert again.resumed
    whole = convert(source, dataclasses.replace(options, out=tmp_path / "whole.gguf"))
    assert Path(again.path).read_bytes() == Path(whole.path).read_bytes()
