from __future__ import annotations

import os
from pathlib import Path

import pytest

from nanorun.cli import benchmarks
from nanorun.cli.benchmarks import (
    cache_path,
    disk_bandwidth,
    memory_bandwidth,
    with_known_speeds,
    with_measured_speeds,
)
from tests.plan.profiles import profile

MIB = 2**20


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "_ROUND_S", 0.01)
    monkeypatch.setattr(benchmarks, "_DISK_BYTES", 8 * MIB)


def test_speeds_are_measured_once(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = profile("cpu-24g")
    assert with_known_speeds(machine) == machine
    measured = with_measured_speeds(machine)
    assert measured.host.bandwidth > 0 and measured.host.bandwidth != machine.host.bandwidth
    assert measured.disk_bandwidth > 0
    assert with_known_speeds(machine) == measured

    def again(*_args: object) -> float:
        raise AssertionError("it was measured again")

    monkeypatch.setattr(benchmarks, "memory_bandwidth", again)
    monkeypatch.setattr(benchmarks, "disk_bandwidth", again)
    assert with_measured_speeds(machine) == measured
    assert with_known_speeds(profile("laptop-32g")).host == profile("laptop-32g").host


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}'])
def test_damaged_cache_is_measured_anew(quick: None, text: str) -> None:
    cache_path().parent.mkdir(parents=True, exist_ok=True)
    cache_path().write_text(text)
    machine = profile("cpu-24g")
    assert with_known_speeds(machine) == machine
    assert with_known_speeds(machine) != with_measured_speeds(machine)


def test_more_memory_than_there_is_is_not_taken(quick: None) -> None:
    assert memory_bandwidth(4, available_bytes=64 * MIB) > 0


def test_folder_that_cannot_be_written_has_no_speed(tmp_path: Path, quick: None) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    assert disk_bandwidth(file / "below") is None
    assert disk_bandwidth(tmp_path) is not None
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208  # nothing is left behind
