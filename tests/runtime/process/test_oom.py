from __future__ import annotations

from pathlib import Path

import pytest

from nanorun.runtime.process.oom import KillCounter, died_of_memory, is_about_memory


class Kernel:
    """A `/proc` and a `/sys/fs/cgroup` that count kills."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.cgroups.mkdir()
        self.tell(machine=3)

    def tell(self, *, machine: int) -> None:
        (self.proc / "vmstat").write_text(f"pgfault 12\noom_kill {machine}\noom_kill_disable 9\n")

    def put_in_group(self, line: str, file: str, n_kills: int) -> None:
        (self.proc / "self" / "cgroup").write_text(line + "\n")
        path = self.cgroups / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"low 0\noom 4\noom_kill {n_kills}\noom_group_kill 8\n")

    def counter(self) -> KillCounter:
        return KillCounter(self.proc, self.cgroups)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("0::/user/service", "user/service/memory.events"),
        ("0::/user/service", "memory.events"),  # of the container, which is all that is seen
        ("4:memory:/docker/abc", "memory/docker/abc/memory.oom_control"),
    ],
)
def test_kills_of_machine_and_group_are_counted(kernel: Kernel, line: str, file: str) -> None:
    assert kernel.counter().count() == 3
    kernel.put_in_group(line, file, 2)
    counter = kernel.counter()
    assert counter.count() == 5
    assert not died_of_memory(-9, counter, [])
    kernel.put_in_group(line, file, 3)
    assert died_of_memory(-9, counter, [])


def test_kernel_that_does_not_count_blames_nobody(tmp_path: Path) -> None:
    counter = KillCounter(tmp_path, tmp_path)
    assert counter.count() == 0
    assert not died_of_memory(-9, counter, [])


def test_kill_counts_as_memory_only_if_the_counter_rose(kernel: Kernel) -> None:
    counter = kernel.counter()
    assert not died_of_memory(-9, counter, [])
    kernel.tell(machine=4)
    assert died_of_memory(-9, counter, [])
    assert not died_of_memory(-11, counter, [])  # a crash is a crash
    assert not died_of_memory(1, counter, [])


def test_kills_of_long_ago_are_no_evidence(kernel: Kernel) -> None:
    counter = kernel.counter()
    kernel.tell(machine=4)
    for _ in range(10):
        counter.note()
    assert not died_of_memory(-9, counter, [])
    kernel.tell(machine=5)
    counter.note()  # a large process may end seconds after it was killed
    assert died_of_memory(-9, counter, [])


def test_kill_while_memory_was_nearly_spent_is_put_down_to_it(kernel: Kernel) -> None:
    assert died_of_memory(-9, kernel.counter(), [], was_short=True)
    assert not died_of_memory(-15, kernel.counter(), [], was_short=True)


def test_last_words_about_memory_count(kernel: Kernel) -> None:
    assert died_of_memory(-6, kernel.counter(), ["CUDA error: out of memory"])
    assert not died_of_memory(-6, kernel.counter(), ["GGML_ASSERT(n_tokens > 0) failed"])


@pytest.mark.parametrize(
    ("line", "is_memory"),
    [
        ("CUDA error: out of memory", True),
        ("ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 12", True),
        ("GGML_ASSERT(n_tokens > 0) failed", False),
    ],
)
def test_complaints_about_memory_are_recognised(line: str, is_memory: bool) -> None:
    assert is_about_memory(line) is is_memory
