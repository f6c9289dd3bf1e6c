"""What this process takes: of main memory as the kernel counts it, of GPUs as their driver does."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanorun.model.nvml import Nvml, NvmlGpu, open_nvml

_PEAK_INTERVAL_S = 0.05
_ROLLUP = Path("/proc/self/smaps_rollup")


def resident_bytes() -> int:
    """Resident bytes, those that are shared with other processes counted in full."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def proportional_bytes(rollup: Path = _ROLLUP) -> int | None:
    """Resident bytes, shared ones counted in parts (PSS); None where the kernel does not say.

    Walks all pages, which takes milliseconds a gigabyte.
    """
    try:
        lines = rollup.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("Pss:")]
    return int(found[0][1]) * 1024 if found else None


@contextmanager
def peak_resident() -> Iterator[list[int]]:
    """Watches resident memory while the block runs; the one number is the most there was."""
    peak = [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_PEAK_INTERVAL_S):
            peak[0] = max(peak[0], resident_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


class GpuMemory:
    """What this process takes of each NVIDIA GPU, if there is a driver to ask.

    Counted from when it is made: inside a container the driver may not know the process by its id,
    and then what the whole GPU holds more than at the start stands for it.
    """

    def __init__(self) -> None:
        self._before = _used_by_gpu()

    def taken(self) -> dict[str, int]:
        """Bytes by the engine's name of the GPU (`CUDA0`)."""
        mine = _used_by_gpu(os.getpid())
        growth = {name: used - self._before[name] for name, used in _used_by_gpu().items()
                  if name in self._before}  # fmt: skip
        return {name: mine.get(name) or max(0, more) for name, more in growth.items()}


def _used_by_gpu(pid: int | None = None) -> dict[str, int]:
    """Bytes used of each GPU, by everyone or by one process; empty without a driver."""
    with open_nvml() as nvml:
        pairs = [(f"CUDA{i}", _used(nvml, gpu, pid)) for i, gpu in enumerate(nvml.gpus())]
    return {name: used for name, used in pairs if used is not None}


def _used(nvml: Nvml, gpu: NvmlGpu, pid: int | None) -> int | None:
    if pid is None:
        memory = nvml.memory(gpu)
        # GB10 and Jetson have no memory of their own to ask for.
        return memory.used if memory is not None and memory.total else None
    processes = nvml.ask("nvmlDeviceGetComputeRunningProcesses", gpu) or ()
    return next((int(p.usedGpuMemory) for p in processes if p.pid == pid and p.usedGpuMemory), None)
