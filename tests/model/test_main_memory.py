from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from nanorun.model.main_memory import read_main_memory

GIB = 2**30


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A `/proc` of a machine of 24 GiB, of which 10 are available."""
    folder = tmp_path / "proc"
    (folder / "self").mkdir(parents=True)
    (folder / "self" / "cgroup").write_text("0::/\n")
    (folder / "meminfo").write_text(
        f"MemTotal: {24 * GIB // 1024} kB\nMemFree: 5 kB\nMemAvailable: {10 * GIB // 1024} kB\n"
        "HugePages_Total:\n"
    )
    return folder


def limit_group(folder: Path, limit: int, used: int) -> None:
    folder.mkdir()
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")


def test_memory_of_the_machine(proc: Path, tmp_path: Path) -> None:
    memory = read_main_memory(proc, tmp_path / "none")
    assert (memory.total_bytes, memory.available_bytes) == (24 * GIB, 10 * GIB)
    assert memory.limit is None


def test_group_that_has_less_counts(proc: Path, tmp_path: Path) -> None:
    limit_group(tmp_path / "groups", 8 * GIB, 5 * GIB)
    memory = read_main_memory(proc, tmp_path / "groups")
    assert (memory.total_bytes, memory.available_bytes) == (8 * GIB, 3 * GIB)
    assert memory.limit == "cgroup v2 limit 8.0 GiB"


def test_machine_that_has_less_than_the_group_counts(proc: Path, tmp_path: Path) -> None:
    limit_group(tmp_path / "groups", 16 * GIB, GIB)
    memory = read_main_memory(proc, tmp_path / "groups")
    assert (memory.total_bytes, memory.available_bytes) == (16 * GIB, 10 * GIB)
    assert memory.limit is None


@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB\n", "MemTotal\nMemAvailable: x kB\n"])
def test_system_that_does_not_say_is_asked_by_psutil(proc: Path, tmp_path: Path, text: str) -> None:
    (proc / "meminfo").write_text(text)
    memory = read_main_memory(proc, tmp_path / "none")
    assert memory.total_bytes == psutil.virtual_memory().total
