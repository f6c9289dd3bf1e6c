"""`nanorun doctor`: what this machine has, and what keeps nanorun from using it."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from nanorun import __version__
from nanorun.cli import options as opt
from nanorun.cli.diagnostics import write_data, write_json
from nanorun.errors import ExitCode, NanorunError
from nanorun.model.units import GIB, format_gib

if TYPE_CHECKING:
    from nanorun.plan.machine.hardware import Hardware

_LIBRARIES = ("llama-cpp-python", "numpy", "textual", "fastapi", "torch", "nvidia-ml-py")
_LEAST_DISK_BYTES = 20 * GIB


def command(as_json: opt.JsonOption = False) -> int:
    """Show what this machine has, and what is wrong with it.

    The speed of memory and disk is measured the first time. With --json, the key `hardware` is a
    profile for `nanorun plan --hardware`. Exits with 1 if something keeps nanorun from running
    well.
    """
    from nanorun.cli.benchmarks import with_measured_speeds
    from nanorun.plan.machine.hardware import as_profile, detect_hardware

    hardware = with_measured_speeds(detect_hardware())
    devices, problems = _engine()
    problems += find_problems(hardware)
    libraries = {name: _version(name) for name in _LIBRARIES}
    if as_json:
        write_json(
            {
                "nanorun": __version__,
                "python": platform.python_version(),
                "platform": platform.platform(),
                "hardware": as_profile(hardware),
                "devices": devices,
                "libraries": libraries,
                "free_disk_bytes": hardware.disk_free_bytes,
                "notes": find_notes(hardware),
                "problems": problems,
            }
        )
    else:
        write_data(_render(hardware, devices, libraries, problems))
    return ExitCode.FAILURE if problems else ExitCode.OK


def find_problems(hardware: Hardware) -> list[dict[str, str]]:
    """What is wrong with a machine, each with the command that mends it."""
    problems = [
        {
            "problem": f"{gpu.description} is there, but llama-cpp-python was built without CUDA",
            "try": reinstall_command(),
        }
        for gpu in hardware.unusable
    ]
    problems += [
        {"problem": str(fault), "try": "nvidia-smi"} for fault in hardware.faults if fault.costs_gpu
    ]
    if 0 < hardware.disk_free_bytes < _LEAST_DISK_BYTES:
        free = format_gib(hardware.disk_free_bytes)
        problems.append({"problem": f"{free} of disk are free; Nano takes 10 to 34 GiB", "try": ""})
    return problems


def find_notes(hardware: Hardware) -> list[str]:
    """What did not work, but takes nothing away that matters."""
    return [str(fault) for fault in hardware.faults if not fault.costs_gpu]


def reinstall_command() -> str:
    """The command that builds the engine for NVIDIA GPUs, at the version that is installed."""
    pinned = _version("llama-cpp-python")
    package = f"llama-cpp-python=={pinned}" if pinned else "'llama-cpp-python>=0.3.36,<0.4'"
    install = f"{sys.executable} -m pip install --force-reinstall --no-cache-dir --no-deps"
    return f"CMAKE_ARGS=-DGGML_CUDA=on {install} --no-binary llama-cpp-python {package}"


def _engine() -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    from nanorun.runtime.measure.probe import engine_devices

    try:
        return engine_devices(), []
    except NanorunError as error:
        facts = "; ".join(error.facts)
        problem = f"the engine cannot be loaded: {error.message}" + (f" ({facts})" if facts else "")
        return [], [{"problem": problem, "try": "pip install --force-reinstall llama-cpp-python"}]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _render(
    hardware: Hardware,
    devices: list[dict[str, Any]],
    libraries: dict[str, str | None],
    problems: list[dict[str, str]],
) -> str:
    host = hardware.host
    rows = [
        ("nanorun", f"{__version__}, Python {platform.python_version()}, {platform.platform()}"),
        ("processor", f"{host.description}, {_cores(hardware)}"),
        ("memory", _memory(hardware)),
        ("disk", _disk(hardware)),
        *((gpu.name, _accelerator(gpu)) for gpu in (*hardware.accelerators, *hardware.unusable)),
        ("engine", ", ".join(f"{d['name']} ({d['description']})" for d in devices) or "none"),
        ("libraries", ", ".join(f"{n} {v or 'missing'}" for n, v in libraries.items())),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    for problem in problems:
        lines += ["", f"problem: {problem['problem']}"]
        lines += [f"  try: {problem['try']}"] if problem["try"] else []
    for text in find_notes(hardware):
        lines += ["", f"note: {text}"]
    lines += ["", "no problems found"] if not problems else []
    return "\n".join(lines) + "\n"


def _cores(hardware: Hardware) -> str:
    host = hardware.host
    if host.n_slow_cores:
        return f"{host.n_cores} fast cores, {host.n_slow_cores} slow ones that are not used"
    return f"{host.n_cores} core{'s' * (host.n_cores != 1)}"


def _disk(hardware: Hardware) -> str:
    if not hardware.disk_free_bytes:
        return "there is no home folder that could be measured"
    text = f"{format_gib(hardware.disk_free_bytes)} free in the home folder"
    return text + (f", reads {_rate(hardware.disk_bandwidth)}" if hardware.disk_bandwidth else "")


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s"


def _memory(hardware: Hardware) -> str:
    host = hardware.host
    text = f"{format_gib(host.available_bytes)} available of {format_gib(host.total_bytes)}"
    text += f", {host.limit}" if host.limit else ""
    text += f", reads {_rate(host.bandwidth)}" if host.bandwidth else ""
    return text + (", shared with the accelerator" if hardware.is_unified else "")


def _accelerator(gpu: Any) -> str:
    if gpu.is_unified:
        return f"{gpu.description}, in the host's memory"
    memory = f"{format_gib(gpu.free_bytes)} free of {format_gib(gpu.total_bytes)}"
    return f"{gpu.description}, {memory}, {gpu.bandwidth / 1e9:.0f} GB/s"
