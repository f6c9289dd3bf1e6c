from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nanorun.runtime.measure import process_memory
from nanorun.runtime.measure.process_memory import (
    GpuMemory,
    peak_resident,
    proportional_bytes,
    resident_bytes,
)

MIB = 2**20


class FakeNvml:
    """The driver's library as far as it is asked: used bytes of each GPU, and of each process."""

    class NVMLError(Exception):
        pass

    def __init__(self, used: list[int | None], mine: list[int | None]) -> None:
        self.used, self.mine = used, mine
        self.n_open = 0

    def nvmlInit(self) -> None:
        self.n_open += 1

    def nvmlShutdown(self) -> None:
        self.n_open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.used)

    def nvmlDeviceGetHandleByIndex(self, i: int) -> int:
        return i

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        if self.used[handle] is None:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(used=self.used[handle])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=self.mine[handle])
        return [SimpleNamespace(pid=1, usedGpuMemory=77 * MIB), mine]


def use(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml, visible: str | None = None) -> None:
    monkeypatch.setattr(process_memory, "import_module", lambda _name: nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def test_what_the_driver_counts_for_the_process_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(used=[100 * MIB, 0], mine=[500 * MIB, None])
    use(monkeypatch, nvml)
    memory = GpuMemory()
    nvml.used = [900 * MIB, 300 * MIB]
    # The second does not know the process, as in a container: what the GPU gained stands for it.
    assert memory.taken() == {"CUDA0": 500 * MIB, "CUDA1": 300 * MIB}
    assert nvml.n_open == 0


def test_gpu_without_memory_of_its_own_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeNvml(used=[None], mine=[None]))
    assert GpuMemory().taken() == {}


@pytest.mark.parametrize(
    ("visible", "taken"),
    [("1", {"CUDA0": 5}), ("1,0", {"CUDA0": 5, "CUDA1": 4}), ("", {}), ("GPU-1", {"CUDA0": 4})],
)
def test_gpus_are_numbered_as_the_engine_numbers_them(
    monkeypatch: pytest.MonkeyPatch, visible: str, taken: dict[str, int]
) -> None:
    use(monkeypatch, FakeNvml(used=[0, 0], mine=[4, 5]), visible)
    found = GpuMemory().taken()
    assert {name: found[name] for name in taken} == taken
    assert len(found) == (2 if visible == "GPU-1" else len(taken))


def test_machine_without_a_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(process_memory, "import_module", missing)
    assert GpuMemory().taken() == {}


def test_proportional_bytes_are_what_the_kernel_says(tmp_path: Path) -> None:
    rollup = tmp_path / "smaps_rollup"
    rollup.write_text(
        "7f0-7ff ---p 0 00:00 0 [rollup]\nRss: 900 kB\nPss:  123 kB\nPss_Anon: 1 kB\n"
    )
    assert proportional_bytes(rollup) == 123 * 1024
    assert proportional_bytes(tmp_path / "missing") is None


def test_peak_is_kept_after_memory_is_given_back() -> None:
    with peak_resident() as peak:
        touched = np.ones(64 * MIB, np.uint8)
        # Other memory of this process may come and go; what counts is what there was then.
        most = resident_bytes() - 4 * MIB
        while peak[0] < most:
            time.sleep(0.01)
        del touched
    assert peak[0] >= most
