from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nanorun.runtime.measure.process_memory import (
    GpuMemory,
    peak_resident,
    proportional_bytes,
    resident_bytes,
)
from tests.support.fake_nvml import GPU_IS_LOST, NOT_SUPPORTED, FakeNvml, NVMLError

MIB = 2**20


def gpus(
    monkeypatch: pytest.MonkeyPatch,
    used: list[int],
    mine: list[int | None],
    visible: str | None = None,
) -> FakeNvml:
    nvml = FakeNvml(len(used)).install(monkeypatch)
    nvml.used, nvml.mine = used, mine
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    return nvml


def test_what_the_driver_counts_for_the_process_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = gpus(monkeypatch, used=[100 * MIB, 0], mine=[500 * MIB, None])
    memory = GpuMemory()
    nvml.used = [900 * MIB, 300 * MIB]
    # The second does not know the process, as in a container: what the GPU gained stands for it.
    assert memory.taken() == {"CUDA0": 500 * MIB, "CUDA1": 300 * MIB}
    assert nvml.n_open == 0


def test_gpu_without_memory_of_its_own_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = gpus(monkeypatch, used=[0], mine=[None])
    nvml.fail("nvmlDeviceGetMemoryInfo", NVMLError(NOT_SUPPORTED))
    assert GpuMemory().taken() == {}


@pytest.mark.parametrize("call", [name for name in dir(FakeNvml) if name.startswith("nvml")])
@pytest.mark.parametrize("error", [NVMLError(GPU_IS_LOST), AttributeError("none"), OSError()])
def test_failing_driver_stops_no_measurement(
    monkeypatch: pytest.MonkeyPatch, call: str, error: Exception
) -> None:
    gpus(monkeypatch, used=[0], mine=[4]).fail(call, error)
    taken = GpuMemory().taken()
    # Where the driver does not name processes, what the GPU gained stands for this one.
    assert taken in ({}, {"CUDA0": 4}, {"CUDA0": 0})


@pytest.mark.parametrize(
    ("visible", "taken"),
    [("1", {"CUDA0": 5}), ("1,0", {"CUDA0": 5, "CUDA1": 4}), ("", {}), ("GPU-1", {"CUDA0": 4})],
)
def test_gpus_are_numbered_as_the_engine_numbers_them(
    monkeypatch: pytest.MonkeyPatch, visible: str, taken: dict[str, int]
) -> None:
    gpus(monkeypatch, [0, 0], [4, 5], visible)
    found = GpuMemory().taken()
    assert {name: found[name] for name in taken} == taken
    assert len(found) == (2 if visible == "GPU-1" else len(taken))


def test_machine_without_a_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
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
