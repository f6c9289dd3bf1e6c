"""Kinds of cores, from made-up copies of /sys/devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanorun.plan.machine.cores import Cores, detect_cores, parse_cpu_list


def machine(root: Path, siblings: list[str], **files: list[object]) -> Path:
    """Processors with their cores; files by name with a value for each processor."""
    for i, text in enumerate(siblings):
        cpu = root / "system" / "cpu" / f"cpu{i}"
        (cpu / "topology").mkdir(parents=True)
        (cpu / "topology" / "thread_siblings_list").write_text(f"{text}\n")
        for name, values in files.items():
            path = cpu / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{values[i]}\n")
    return root


def test_intel_hybrid_has_fast_and_slow_cores(tmp_path: Path) -> None:
    # Two P-cores of two threads each, four E-cores.
    root = machine(tmp_path, ["0-1", "0-1", "2-3", "2-3", "4", "5", "6", "7"])
    (root / "cpu_atom").mkdir()
    (root / "cpu_atom" / "cpus").write_text("4-7\n")
    assert detect_cores(root, range(8)) == Cores(n_fast=2, n_slow=4)
    # What the process may not use does not count, and slow ones alone are not slow.
    assert detect_cores(root, [0, 1, 4]) == Cores(n_fast=1, n_slow=1)
    assert detect_cores(root, [4, 5]) == Cores(n_fast=2)


def test_arm_tells_each_cores_capacity(tmp_path: Path) -> None:
    # As GB10: ten of each kind.
    capacities: list[object] = [718] * 10 + [1024] * 10
    root = machine(tmp_path, [str(i) for i in range(20)], cpu_capacity=capacities)
    assert detect_cores(root, range(20)) == Cores(n_fast=10, n_slow=10)


def test_compact_cores_are_told_by_their_clock(tmp_path: Path) -> None:
    clocks: list[object] = [5_100_000] * 8 + [3_300_000] * 8
    siblings = [f"{i // 2 * 2}-{i // 2 * 2 + 1}" for i in range(16)]
    root = machine(tmp_path, siblings, cpufreq__cpuinfo_max_freq=clocks)
    assert detect_cores(root, range(16)) == Cores(n_fast=4, n_slow=4)


def test_favoured_cores_are_no_kind_of_their_own(tmp_path: Path) -> None:
    clocks: list[object] = [5_800_000, 5_800_000, 5_500_000, 5_500_000]
    root = machine(tmp_path, list("0123"), cpufreq__cpuinfo_max_freq=clocks)
    assert detect_cores(root, range(4)) == Cores(n_fast=4)


def test_threads_of_a_core_count_once(tmp_path: Path) -> None:
    root = machine(tmp_path, ["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"])
    assert detect_cores(root, range(8)) == Cores(n_fast=4)
    assert detect_cores(root, [4, 5]) == Cores(n_fast=2)


def test_system_that_does_not_tell_is_not_guessed_at(tmp_path: Path) -> None:
    assert detect_cores(tmp_path, range(4)) is None
    assert detect_cores(machine(tmp_path, ["?"]), [0]) is None


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0-2,8", {0, 1, 2, 8}), ("", set()), ("x,3", {3}), ("1-x", set()), ("5-4", set()),
     ("7\n", {7})],
)  # fmt: skip
def test_cpu_lists_are_read(text: str, numbers: set[int]) -> None:
    assert parse_cpu_list(text) == numbers
