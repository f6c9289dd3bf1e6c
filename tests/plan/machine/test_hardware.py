from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nanorun.errors import UsageError
from nanorun.model.cgroups import memory_limit, n_cpus_allowed
from nanorun.plan.explain import decisions
from nanorun.plan.machine import hardware
from nanorun.plan.machine.hardware import (
    Host,
    as_profile,
    detect_hardware,
    detect_nvidia,
    read_profile,
)
from nanorun.plan.memory_plan import plan_model
from nanorun.plan.plan import Wish
from tests.plan.profiles import NAMES, profile
from tests.support.fake_nvml import (
    DRIVER_NOT_LOADED,
    GPU_IS_LOST,
    LIBRARY_NOT_FOUND,
    MISMATCH,
    NOT_SUPPORTED,
    FakeNvml,
    NoTextError,
    NVMLError,
)
from tests.support.fakes import fake_shape

GIB = 2**30
HOST = Host(description="cpu", total_bytes=128 * GIB, available_bytes=100 * GIB, n_cores=20)


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_limit_of_cgroup_v2_counts_cached_files_as_free(tmp_path: Path) -> None:
    proc = tmp_path / "cgroup"
    proc.write_text("0::/user/service\n")
    group(tmp_path / "root/user/service", memory__max=8 * GIB, memory__current=6 * GIB)
    (tmp_path / "root/user/service/memory.stat").write_text(f"anon 1\ninactive_file {GIB}\n")
    limit = memory_limit(proc, tmp_path / "root")
    assert limit is not None
    assert (limit.total_bytes, limit.free_bytes) == (8 * GIB, 3 * GIB)
    assert limit.description == "cgroup v2 limit 8.0 GiB"


@pytest.mark.parametrize("version", [1, 2])
def test_weights_that_were_mapped_before_are_free_in_a_group(tmp_path: Path, version: int) -> None:
    """The kernel lists file pages as active once they were used twice, and drops them as well."""
    proc, root = tmp_path / "cgroup", tmp_path / "root"
    stat = f"anon {GIB}\ninactive_file {GIB}\nactive_file {3 * GIB}\n"
    if version == 2:
        proc.write_text("0::/\n")
        group(root, memory__max=8 * GIB, memory__current=6 * GIB)
        (root / "memory.stat").write_text(stat)
    else:
        proc.write_text("3:memory:/\n")
        group(root / "memory", memory__limit_in_bytes=8 * GIB, memory__usage_in_bytes=6 * GIB)
        (root / "memory" / "memory.stat").write_text(
            "active_file 5\n" + "".join(f"total_{line}\n" for line in stat.splitlines())
        )
    limit = memory_limit(proc, root)
    assert limit is not None
    assert limit.free_bytes == 6 * GIB


def test_group_is_slowed_to_a_halt_at_its_high_mark(tmp_path: Path) -> None:
    proc = tmp_path / "cgroup"
    proc.write_text("0::/\n")
    group(tmp_path / "root", memory__max="max", memory__high=4 * GIB, memory__current=GIB)
    limit = memory_limit(proc, tmp_path / "root")
    assert limit is not None
    assert (limit.total_bytes, limit.free_bytes) == (4 * GIB, 3 * GIB)


@pytest.mark.parametrize(
    ("total", "limit", "cushion"),
    [
        (2 * GIB, None, 384 * 2**20),
        (6 * GIB, None, 6 * GIB // 8),
        (16 * GIB, None, GIB),
        (24 * GIB, None, 24 * GIB * 6 // 100),
        (128 * GIB, None, 128 * GIB * 6 // 100),
        (4 * GIB, "cgroup v2 limit 4.0 GiB", 384 * 2**20),
        (64 * GIB, "cgroup v2 limit 64.0 GiB", 64 * GIB // 50),
    ],
)
def test_cushion_is_chosen_by_the_machine(total: int, limit: str | None, cushion: int) -> None:
    host = replace(HOST, total_bytes=total, available_bytes=total, limit=limit)
    assert host.cushion_bytes == cushion
    assert replace(host, leave_bytes=0).cushion_bytes == 0


def test_tightest_group_above_the_process_counts(tmp_path: Path) -> None:
    proc = tmp_path / "cgroup"
    proc.write_text("0::/user/service\n")
    group(tmp_path / "root/user/service", memory__max="max", memory__current=GIB)
    group(tmp_path / "root/user", memory__max=4 * GIB, memory__current=GIB)
    limit = memory_limit(proc, tmp_path / "root")
    assert limit is not None
    assert limit.free_bytes == 3 * GIB


def test_limit_of_cgroup_v1(tmp_path: Path) -> None:
    proc = tmp_path / "cgroup"
    proc.write_text("5:cpu,cpuacct:/x\n3:memory:/docker/abc\n")
    files = {"memory__limit_in_bytes": 2 * GIB, "memory__usage_in_bytes": GIB}
    # Inside a container the path is that of the machine, and only the root is mounted.
    group(tmp_path / "root/memory", **files)
    limit = memory_limit(proc, tmp_path / "root")
    assert limit is not None
    assert limit.description == "cgroup v1 limit 2.0 GiB"
    assert limit.free_bytes == GIB


def test_unlimited_groups_limit_nothing(tmp_path: Path) -> None:
    proc = tmp_path / "cgroup"
    proc.write_text("3:memory:/\n0::/\n")
    group(tmp_path / "root/memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=1)
    assert memory_limit(proc, tmp_path / "root") is None
    assert memory_limit(tmp_path / "missing", tmp_path / "root") is None


def test_cpu_quota_rounds_up(tmp_path: Path) -> None:
    proc = tmp_path / "cgroup"
    proc.write_text("0::/\n")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/cpu.max").write_text("50000 100000\n")
    assert n_cpus_allowed(proc, tmp_path / "root") == 1
    (tmp_path / "root/cpu.max").write_text("max 100000\n")
    assert n_cpus_allowed(proc, tmp_path / "root") >= 1


def test_gpu_with_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    nvml.fail("nvmlDeviceGetNumGpuCores", NVMLError(NOT_SUPPORTED))
    nvml.install(monkeypatch)
    ((gpu,), faults) = detect_nvidia(HOST)
    assert faults == []
    assert (gpu.name, gpu.total_bytes, gpu.free_bytes) == ("CUDA0", 24 * GIB, 23 * GIB)
    assert gpu.bandwidth == pytest.approx(1008e9, rel=0.001)
    assert gpu.flops == 0.0
    assert not gpu.is_unified
    assert nvml.n_open == 0


def test_gpu_without_memory_of_its_own_shares_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    nvml.fail("nvmlDeviceGetMemoryInfo", NVMLError(NOT_SUPPORTED))
    nvml.install(monkeypatch)
    ((gpu,), faults) = detect_nvidia(HOST)
    assert faults == []
    assert gpu.is_unified
    assert (gpu.total_bytes, gpu.free_bytes) == (HOST.total_bytes, HOST.available_bytes)


@pytest.mark.parametrize(
    ("setting", "shown"),
    [("1", ["#1"]), ("2,0", ["#2", "#0"]), ("0,7,1", ["#0"]), ("", []), ("GPU-12ab", ["#0", "#1"])],
)
def test_hidden_gpus_are_not_planned_with(
    monkeypatch: pytest.MonkeyPatch, setting: str, shown: list[str]
) -> None:
    FakeNvml(2 if "GPU" in setting else 3).install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    gpus, _ = detect_nvidia(HOST)
    assert [gpu.description[-2:] for gpu in gpus] == shown
    assert [gpu.name for gpu in gpus] == [f"CUDA{i}" for i in range(len(gpus))]


def test_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert detect_nvidia(HOST) == ([], [])
    nvml = FakeNvml().install(monkeypatch)
    nvml.fail("nvmlInit", NVMLError(LIBRARY_NOT_FOUND))
    assert detect_nvidia(HOST) == ([], [])


@pytest.mark.parametrize("has_cuda", [True, False])
def test_gpu_counts_only_if_the_engine_was_built_for_it(
    monkeypatch: pytest.MonkeyPatch, has_cuda: bool
) -> None:
    FakeNvml().install(monkeypatch)
    monkeypatch.setattr(hardware, "engine_has_backend", lambda name: has_cuda)
    found = detect_hardware()
    assert len(found.accelerators) == has_cuda
    assert len(found.unusable) == (not has_cuda)


BROKEN_NAME = UnicodeDecodeError("utf-8", b"NVIDIA RTX \xf0\x9f", 11, 13, "unexpected end of data")
HARMLESS = {
    "name": ("nvmlDeviceGetName", BROKEN_NAME, "not UTF-8"),
    "name of a lost GPU": ("nvmlDeviceGetName", NVMLError(GPU_IS_LOST), "fell off the bus"),
    "bus": ("nvmlDeviceGetMemoryBusWidth", NVMLError(999), "the driver does not say why"),
    "clock": ("nvmlDeviceGetMaxClockInfo", OSError("cut off"), "how fast this GPU is"),
    "old driver": ("nvmlDeviceGetNumGpuCores", NVMLError(13), "too old for this question"),
    "shutdown": ("nvmlShutdown", NVMLError(1), "nothing is lost"),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_failing_question_leaves_the_gpu_usable(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    call, error, meaning = HARMLESS[case]
    nvml = FakeNvml().install(monkeypatch)
    nvml.fail(call, error)
    ((gpu,), (fault,)) = detect_nvidia(HOST)
    assert gpu.free_bytes == 23 * GIB
    assert call in str(fault)
    assert meaning in str(fault)
    assert not fault.costs_gpu


@pytest.mark.parametrize("name", [b"NVIDIA RTX\xf0\x9f", "NVIDIA RTX", BROKEN_NAME])
def test_name_is_what_of_it_is_text(
    monkeypatch: pytest.MonkeyPatch, name: str | bytes | Exception
) -> None:
    nvml = FakeNvml().install(monkeypatch)
    if isinstance(name, Exception):
        nvml.fail("nvmlDeviceGetName", name)
    else:
        monkeypatch.setattr(nvml, "nvmlDeviceGetName", lambda _handle: name)
    ((gpu,), _) = detect_nvidia(HOST)
    assert gpu.description == "NVIDIA RTX"


@pytest.mark.parametrize("call", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMemoryInfo"])
def test_lost_gpu_leaves_the_others(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    nvml = FakeNvml(3).install(monkeypatch)
    nvml.fail(call, NVMLError(GPU_IS_LOST, "GPU is lost"), gpu=1)
    gpus, (fault,) = detect_nvidia(HOST)
    assert [gpu.description[-2:] for gpu in gpus] == ["#0", "#2"]
    assert [gpu.name for gpu in gpus] == ["CUDA0", "CUDA1"]
    assert str(fault) == (
        f"NVIDIA's driver failed in {call} of GPU 1 (GPU is lost): it fell off the bus, and a"
        " restart of the machine brings it back; this GPU is not used"
    )
    assert fault.costs_gpu


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("nvmlInit", NVMLError(MISMATCH)),
        ("nvmlInit", NVMLError(DRIVER_NOT_LOADED)),
        ("nvmlInit", OSError("libnvidia-ml.so.1: invalid ELF header")),
        ("nvmlDeviceGetCount", NVMLError(GPU_IS_LOST)),
        ("nvmlDeviceGetCount", NoTextError(999)),
    ],
)
def test_failing_driver_leaves_the_cpu(
    monkeypatch: pytest.MonkeyPatch, call: str, error: Exception
) -> None:
    FakeNvml().install(monkeypatch).fail(call, error)
    found = detect_hardware()
    assert (found.accelerators, found.unusable) == ((), ())
    assert found.host.n_cores >= 1
    assert [(fault.call, fault.costs_gpu) for fault in found.faults] == [(call, True)]


ALL_CALLS = [name for name in dir(FakeNvml) if name.startswith("nvml")]


@pytest.mark.parametrize("call", ALL_CALLS)
def test_binding_that_lacks_a_function_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    FakeNvml().install(monkeypatch).lack(call)
    found = detect_hardware()
    assert found.host.n_cores >= 1
    if call != "nvmlDeviceGetComputeRunningProcesses":  # nobody asks for it here
        (fault,) = found.faults
        assert fault.call.startswith(call)
        assert "pip install --upgrade nvidia-ml-py" in fault.meaning


def test_this_machine_is_described() -> None:
    found = detect_hardware()
    assert 0 < found.host.available_bytes <= found.host.total_bytes
    assert found.host.n_cores >= 1
    assert found.disk_free_bytes > 0


@pytest.mark.parametrize("name", NAMES)
def test_profiles_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    machine = profile(name)
    path = tmp_path / "copy.json"
    path.write_text(json.dumps(as_profile(machine)))
    assert read_profile(path) == machine


@pytest.mark.parametrize("text", ["", "[]", '{"name": "x"}', '{"name": 1, "host": {"cores": 2}}'])
def test_file_that_is_no_profile_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"bad\.json is no hardware profile"):
        read_profile(path)


def test_what_doctor_prints_is_a_profile(tmp_path: Path) -> None:
    machine, path = profile("rtx-4090"), tmp_path / "doctor.json"
    path.write_text(json.dumps({"nanorun": "0.1.0", "hardware": as_profile(machine)}))
    assert read_profile(path) == machine


@pytest.mark.parametrize("has_name", [True, False])
def test_machine_is_detected_without_a_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_name: bool
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    if not has_name:  # neither HOME nor an entry for the user, as in many containers
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    machine = detect_hardware()
    assert machine.disk_free_bytes == 0
    assert machine.host.available_bytes > 0


@pytest.mark.parametrize("device", ["cuda:1", "CUDA1", "cuda1"])
def test_devices_are_named_in_any_spelling(device: str) -> None:
    (gpu,) = profile("2x-rtx-3090").restricted(device).accelerators
    assert gpu.name == "CUDA1"


def test_cpu_and_limits_restrict_a_machine() -> None:
    machine = profile("2x-rtx-3090")
    assert machine.restricted("cpu").accelerators == ()
    limited = machine.restricted(vram=8 * GIB, ram=16 * GIB)
    assert [gpu.free_bytes for gpu in limited.accelerators] == [8 * GIB, 8 * GIB]
    assert limited.host.available_bytes == 16 * GIB


def test_unknown_device_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="no device 'cuda:2'") as caught:
        profile("2x-rtx-3090").restricted("cuda:2")
    assert caught.value.facts == ("devices: auto, cpu, cuda:0, cuda:1",)


def test_plan_names_what_costs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml().install(monkeypatch)
    nvml.fail("nvmlDeviceGetMemoryInfo", NVMLError(GPU_IS_LOST))
    machine = detect_hardware()
    plan = plan_model([fake_shape("pico", Path("pico.gguf"))], machine, Wish(n_ctx=1024))
    reasons = [line for line in decisions(plan) if "nvmlDeviceGetMemoryInfo of GPU 0" in line]
    assert len(reasons) == 1
    assert reasons[0].endswith("this GPU is not used: see `nanorun doctor`")


def test_profile_of_windows_notepad_is_read_and_utf_16_is_named(tmp_path: Path) -> None:
    machine = read_profile(next(Path("tests/data/hardware").glob("*.json")))
    path = tmp_path / "profile.json"
    text = json.dumps(as_profile(machine))
    path.write_text(text, encoding="utf-8-sig")
    assert read_profile(path) == machine
    path.write_text(text, encoding="utf-16")
    with pytest.raises(UsageError, match="expected JSON in UTF-8, found text in UTF-16"):
        read_profile(path)
