from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nanorun.cli.app import invoke
from nanorun.cli.commands import doctor
from nanorun.errors import EngineDied
from nanorun.plan.machine.hardware import Hardware, detect_hardware, read_profile
from tests.plan.profiles import profile
from tests.support.fake_nvml import GPU_IS_LOST, FakeNvml, NVMLError


def detected(monkeypatch: pytest.MonkeyPatch, machine: Hardware) -> None:
    devices = [{"name": "CPU", "description": "a processor"}]
    monkeypatch.setattr("nanorun.plan.machine.hardware.detect_hardware", lambda: machine)
    monkeypatch.setattr("nanorun.runtime.measure.probe.engine_devices", lambda: devices)
    monkeypatch.setattr("nanorun.cli.benchmarks.with_measured_speeds", lambda found: found)


def test_sound_machine_has_no_problems(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    detected(monkeypatch, profile("rtx-4090"))
    assert invoke(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA GeForce RTX 4090, 23.5 GiB free of 24.0 GiB, 1008 GB/s" in out
    assert "no problems found" in out


def test_room_on_a_disk_that_is_not_known_is_not_called_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    detected(monkeypatch, replace(profile("rtx-4090"), disk_free_bytes=0))
    assert invoke(["doctor"]) == 0
    assert "there is no home folder" in capsys.readouterr().out


def test_cores_of_two_kinds_and_measured_speeds_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = profile("laptop-32g")
    host = replace(machine.host, n_cores=6, n_slow_cores=10, bandwidth=61.4e9)
    detected(monkeypatch, replace(machine, host=host, disk_bandwidth=3.21e9))
    assert invoke(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "Ultra 7 155H, 6 fast cores, 10 slow ones that are not used" in out
    assert "24.0 GiB available of 31.0 GiB, reads 61.4 GB/s" in out
    assert "200.0 GiB free in the home folder, reads 3.2 GB/s" in out


def test_gpu_that_the_engine_cannot_use_comes_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = profile("rtx-4090")
    detected(monkeypatch, replace(machine, accelerators=(), unusable=machine.accelerators))
    assert invoke(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "problem: NVIDIA GeForce RTX 4090 is there, but llama-cpp-python was built" in out
    assert "try: CMAKE_ARGS=-DGGML_CUDA=on " in out
    assert "llama-cpp-python==" in doctor.reinstall_command()


def test_engine_that_cannot_be_loaded_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dead() -> list[dict[str, str]]:
        raise EngineDied("the engine ended with signal 4")

    detected(monkeypatch, replace(profile("cpu-24g"), disk_free_bytes=2**30))
    monkeypatch.setattr("nanorun.runtime.measure.probe.engine_devices", dead)
    assert invoke(["doctor", "--json"]) == 1
    problems = [p["problem"] for p in json.loads(capsys.readouterr().out)["problems"]]
    assert problems[0] == "the engine cannot be loaded: the engine ended with signal 4"
    assert problems[1].startswith("1.0 GiB of disk are free")


def test_profile_that_doctor_prints_can_be_planned_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    detected(monkeypatch, profile("dgx-spark"))
    assert invoke(["doctor", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    path = tmp_path / "spark.json"
    path.write_text(json.dumps(shown["hardware"]))
    assert read_profile(path) == profile("dgx-spark")


def test_doctor_names_what_the_driver_did_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvml = FakeNvml(2).install(monkeypatch)
    nvml.fail("nvmlDeviceGetHandleByIndex", NVMLError(GPU_IS_LOST, "GPU is lost"), gpu=0)
    nvml.fail("nvmlShutdown", NVMLError(1, "Uninitialized"))
    monkeypatch.setattr("nanorun.plan.machine.hardware.engine_has_backend", lambda name: True)
    detected(monkeypatch, replace(detect_hardware(), disk_free_bytes=0))
    assert invoke(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "CUDA0      NVIDIA GeForce RTX 4090 #1, 23.0 GiB free of 24.0 GiB" in out
    assert "problem: NVIDIA's driver failed in nvmlDeviceGetHandleByIndex of GPU 0" in out
    assert "  try: nvidia-smi\n" in out
    assert "note: NVIDIA's driver failed in nvmlShutdown (Uninitialized): nothing is lost" in out


def test_harmless_failure_of_the_driver_is_no_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FakeNvml().install(monkeypatch).fail("nvmlShutdown", NVMLError(1))
    monkeypatch.setattr("nanorun.plan.machine.hardware.engine_has_backend", lambda name: True)
    detected(monkeypatch, replace(detect_hardware(), disk_free_bytes=0))
    assert invoke(["doctor", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["problems"] == []
    assert len(shown["notes"]) == 1
