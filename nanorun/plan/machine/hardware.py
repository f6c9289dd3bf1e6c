"""What a machine has: memory that is really free, accelerators, cores, bandwidth.

Detected here, or read from a JSON profile of another machine. Sources that lie are corrected: a
container's limit counts before the machine's RAM, and an accelerator that shares the host's memory
(GB10, Jetson) has no memory of its own, whatever its driver says. The engine is not asked.
"""

from __future__ import annotations

import json
import platform
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nanorun.errors import LibraryError, UsageError
from nanorun.model.cgroups import n_cpus_allowed
from nanorun.model.lookalikes import HEAD_BYTES, look_alike
from nanorun.model.main_memory import default_cushion, read_main_memory
from nanorun.model.nvml import Nvml, NvmlFault, NvmlGpu, open_nvml
from nanorun.plan.machine.cores import Cores, detect_cores

HOST = "CPU"
"""The host's name among the devices of a plan, as the engine calls it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One GPU that the engine could use."""

    name: str
    """As the engine numbers them: `CUDA0`."""
    description: str
    total_bytes: int
    free_bytes: int
    is_unified: bool = False
    """It computes in the host's memory, which is then counted once."""
    bandwidth: float = 0.0
    """Bytes of its memory read per second, at most; 0 if unknown."""
    flops: float = 0.0
    """Dense half-precision operations per second of its matrix units; 0 if unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Processor and main memory."""

    description: str
    total_bytes: int
    available_bytes: int
    """What a new process can take without pushing another one out, within every limit."""
    n_cores: int
    """Physical cores that this process may use; where there are two kinds, the fast ones."""
    n_slow_cores: int = 0
    """Cores of a slower kind beside them (E-cores, LITTLE), which the engine leaves idle."""
    bandwidth: float = 0.0
    """Bytes of main memory read per second by all cores together; 0 if unknown."""
    flops: float = 0.0
    limit: str | None = None
    """What holds memory below the machine's own: `cgroup v2 limit 8.0 GiB`."""
    leave_bytes: int | None = None
    """What a plan leaves to other programs, where a person said how much."""

    @property
    def cushion_bytes(self) -> int:
        """What a plan leaves to other programs."""
        if self.leave_bytes is not None:
            return self.leave_bytes
        return default_cushion(self.total_bytes, is_limited=self.limit is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One machine, or what is known of it."""

    name: str
    host: Host
    accelerators: tuple[Accelerator, ...] = ()
    unusable: tuple[Accelerator, ...] = ()
    """GPUs that are there, but that the installed engine was not built for."""
    faults: tuple[NvmlFault, ...] = ()
    """What NVIDIA's driver did not answer."""
    disk_free_bytes: int = 0
    """In the home folder; 0 if unknown."""
    disk_bandwidth: float = 0.0
    """Bytes read per second where models are kept; 0 if unknown."""

    @property
    def is_unified(self) -> bool:
        """Whether accelerators and host share one memory."""
        return any(gpu.is_unified for gpu in self.accelerators)

    def restricted(
        self,
        device: str = "auto",
        *,
        vram: int | None = None,
        ram: int | None = None,
        leave: int | None = None,
    ) -> Hardware:
        """The part of the machine that a plan may use.

        Args:
            device: `auto` for all of it, `cpu`, or an accelerator's name in any case and with or
                without a colon (`cuda:0`).
            vram: Bytes of each accelerator that may be used, whatever is free.
            ram: The same for main memory, as if there were no more.
            leave: Bytes of main memory that stay free for other programs; None for the default.

        Raises:
            UsageError: If there is no such device.
        """
        accelerators = self._chosen(device)
        if vram is not None:
            accelerators = [replace(gpu, free_bytes=vram) for gpu in accelerators]
        host = self.host
        if ram is not None:
            host = replace(host, total_bytes=ram, available_bytes=ram)
        if leave is not None:
            host = replace(host, leave_bytes=leave)
        return replace(self, host=host, accelerators=tuple(accelerators))

    def _chosen(self, device: str) -> list[Accelerator]:
        wanted = device.strip().lower().replace(":", "")
        if wanted == "auto":
            return list(self.accelerators)
        if wanted == HOST.lower():
            return []
        chosen = [gpu for gpu in self.accelerators if gpu.name.lower() == wanted]
        if not chosen:
            names = ", ".join(["auto", "cpu", *(_flag_name(g.name) for g in self.accelerators)])
            built_out = [g.description for g in self.unusable]
            raise UsageError(
                f"there is no device {device!r}",
                facts=[f"devices: {names}", *(f"the engine cannot use {d}" for d in built_out)],
                tries=["nanorun doctor"] if built_out else [],
            )
        return chosen


def _flag_name(name: str) -> str:
    letters = name.rstrip("0123456789")
    return f"{letters.lower()}:{name[len(letters) :]}"


def detect_hardware() -> Hardware:
    """Look at this machine; takes milliseconds and starts nothing."""
    host = _detect_host()
    found, faults = detect_nvidia(host)
    can_use = engine_has_backend("cuda")
    return Hardware(
        name=platform.node() or "this machine",
        host=host,
        accelerators=tuple(found) if can_use else (),
        unusable=() if can_use else tuple(found),
        faults=tuple(faults),
        disk_free_bytes=_disk_free_bytes(),
    )


def _disk_free_bytes() -> int:
    # Services and containers may have no home folder, or a user without any.
    with suppress(OSError, RuntimeError):
        return shutil.disk_usage(Path.home()).free
    return 0


def read_profile(path: Path) -> Hardware:
    """A machine described by a JSON file: what `as_profile` gives, or `nanorun doctor --json`.

    Raises:
        UsageError: If the file is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
        data = data.get("hardware", data) if isinstance(data, dict) else data
        return Hardware(
            name=data["name"],
            host=Host(**data["host"]),
            accelerators=tuple(Accelerator(**gpu) for gpu in data.get("accelerators", ())),
            disk_free_bytes=data.get("disk_free_bytes", 0),
            disk_bandwidth=data.get("disk_bandwidth", 0.0),
        )
    except UnicodeDecodeError as error:
        found = look_alike(path.read_bytes()[:HEAD_BYTES], str(path))
        reason = f"expected JSON in UTF-8, found {found.what}" if found else str(error)
        raise UsageError(f"{path} cannot be read: {reason}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"{path} cannot be read: {reason}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no hardware profile: {error}", tries=["nanorun doctor --json"]
        ) from error


def as_profile(hardware: Hardware) -> dict[str, Any]:
    """The machine as JSON values; `read_profile` reads them back."""
    return asdict(hardware)


def engine_has_backend(name: str) -> bool:
    """Whether the installed engine was built with a backend (`cuda`); it is not loaded."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return False
    package = Path(spec.origin).parent
    # A second copy of the libraries lies beside the package.
    folders = (package / "lib", package.parent / "lib")
    return any(True for folder in folders for _ in folder.glob(f"*ggml-{name}*"))


def _detect_host() -> Host:
    memory = read_main_memory()
    cores = detect_cores() or Cores(_count_cores())
    return Host(
        description=_cpu_name(),
        total_bytes=memory.total_bytes,
        available_bytes=memory.available_bytes,
        n_cores=min(cores.n_fast, n_cpus_allowed()),
        n_slow_cores=cores.n_slow,
        limit=memory.limit,
    )


def _count_cores() -> int:
    try:
        import psutil
    except ImportError as error:
        raise LibraryError("psutil is missing", tries=["pip install psutil"]) from error
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def _cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# -- NVIDIA -------------------------------------------------------------------------------------


def detect_nvidia(host: Host) -> tuple[list[Accelerator], list[NvmlFault]]:
    """The NVIDIA GPUs that the driver shows to this process, and what it failed to say."""
    found: list[Accelerator] = []
    with open_nvml() as nvml:
        for gpu in nvml.gpus():
            accelerator = _accelerator(nvml, gpu, len(found), host)
            if accelerator is not None:
                found.append(accelerator)
    return found, nvml.faults


def _accelerator(nvml: Nvml, gpu: NvmlGpu, i_device: int, host: Host) -> Accelerator | None:
    memory = nvml.memory(gpu)
    if memory is None:
        return None
    # GB10 and Jetson answer "not supported", or nothing: they work in the host's memory.
    is_unified = not memory.total
    return Accelerator(
        name=f"CUDA{i_device}",
        description=nvml.name(gpu),
        total_bytes=host.total_bytes if is_unified else memory.total,
        free_bytes=host.available_bytes if is_unified else memory.free,
        is_unified=is_unified,
        bandwidth=_bandwidth(nvml, gpu),
        flops=_flops(nvml, gpu),
    )


def _bandwidth(nvml: Nvml, gpu: NvmlGpu) -> float:
    width = nvml.ask("nvmlDeviceGetMemoryBusWidth", gpu) or 0
    # Both edges of the clock carry data.
    return float(width) / 8 * 2 * nvml.clock_mhz(gpu, "MEM") * 1e6


def _flops(nvml: Nvml, gpu: NvmlGpu) -> float:
    n_cores = nvml.ask("nvmlDeviceGetNumGpuCores", gpu) or 0
    # A multiply-add a core and clock in FP32; the matrix units do four times that in FP16.
    return 4 * 2.0 * n_cores * nvml.clock_mhz(gpu, "SM") * 1e6
