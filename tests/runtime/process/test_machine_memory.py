"""How memory stands, read from files as the kernel writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nanorun.runtime.process.machine_memory import MachineMemory, MemoryNow

GIB = 2**30
KIB_OF_GIB = 2**20
PID = 4242
STATUS = "Name:\tpython\nVmRSS:\t 9437184 kB\nRssAnon:\t 1048576 kB\nRssFile:\t 8388608 kB\n"
PRESSURE = (
    "some avg10=31.00 avg60=5.00 avg300=1.00 total=5\n"
    "full avg10=12.50 avg60=2.00 avg300=0.50 total=3\n"
)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A `/proc` of a machine of 24 GiB with 20 available, 8 of them weights that are mapped."""
    folder = tmp_path / "proc"
    for name in ("self", str(PID), "pressure"):
        (folder / name).mkdir(parents=True)
    (folder / "self" / "cgroup").write_text("0::/user/engine\n")
    available = 20 * KIB_OF_GIB
    text = f"MemTotal: {24 * KIB_OF_GIB} kB\nMemAvailable: {available} kB\n"
    (folder / "meminfo").write_text(text)
    (folder / str(PID) / "status").write_text(STATUS)
    return folder


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    folder = tmp_path / "groups"
    (folder / "user" / "engine").mkdir(parents=True)
    return folder


def test_mapped_weights_are_not_free_while_they_are_used(proc: Path, groups: Path) -> None:
    memory = MachineMemory(proc, groups)
    assert memory.before_loading().available_bytes == 20 * GIB
    assert memory.beside(PID) == MemoryNow(12 * GIB, 0.0)


def test_process_that_is_gone_maps_nothing(proc: Path, groups: Path) -> None:
    assert MachineMemory(proc, groups).beside(1).free_bytes == 20 * GIB


def test_group_that_has_less_counts(proc: Path, groups: Path) -> None:
    (groups / "user" / "memory.max").write_text(f"{16 * GIB}\n")
    (groups / "user" / "memory.current").write_text(f"{5 * GIB}\n")
    assert MachineMemory(proc, groups).beside(PID).free_bytes == 3 * GIB


@pytest.mark.parametrize("where", ["machine", "group", "group above"])
def test_waiting_for_memory_is_seen(proc: Path, groups: Path, where: str) -> None:
    (proc / "pressure" / "memory").write_text(PRESSURE.replace("12.50", "0.00"))
    file = {
        "machine": proc / "pressure" / "memory",
        "group": groups / "user" / "engine" / "memory.pressure",
        "group above": groups / "user" / "memory.pressure",
    }[where]
    file.write_text(PRESSURE)
    assert MachineMemory(proc, groups).beside(PID).stalled == 0.125


@pytest.mark.parametrize("text", ["", "some avg10=99.00\n", "full avg10=x\n", "\xff"])
def test_pressure_that_is_not_told_is_none(proc: Path, groups: Path, text: str) -> None:
    (proc / "pressure" / "memory").write_text(text, encoding="latin-1")
    assert MachineMemory(proc, groups).beside(PID).stalled == 0.0


def test_this_machine_can_be_read() -> None:
    memory = MachineMemory().beside(os.getpid())
    assert 0 <= memory.free_bytes <= MachineMemory().before_loading().total_bytes
    assert 0 <= memory.stalled <= 1
