"""A stand-in for the module `pynvml`, whose functions answer or fail as a test says."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

GIB = 2**30
NOT_SUPPORTED, DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND = 3, 9, 12
GPU_IS_LOST, MISMATCH = 15, 18


class NVMLError(Exception):
    """As the binding's: a number, and a text for it."""

    def __init__(self, value: int, text: str = "some reason") -> None:
        super().__init__(text)
        self.value = value


class NoTextError(NVMLError):
    """One whose text cannot be had: the binding asks the library for it, which fails again."""

    def __str__(self) -> str:
        raise NVMLError(999)


class FakeNvml:
    """The driver's library as far as it is asked.

    Args:
        n_gpus: How many there are.
    """

    NVML_CLOCK_MEM, NVML_CLOCK_SM = 2, 1
    NVMLError = NVMLError

    def __init__(self, n_gpus: int = 1) -> None:
        self.n_gpus = n_gpus
        self.used: list[int] = [GIB] * n_gpus
        self.mine: list[int | None] = [None] * n_gpus
        self.n_open = 0

    def fail(self, call: str, error: Exception, *, gpu: int | None = None) -> None:
        """Make a function raise: always, or for one GPU."""
        works: Callable[..., Any] = getattr(self, call)

        def broken(*args: Any) -> Any:
            if gpu is None or args[0] == gpu:
                raise error
            return works(*args)

        setattr(self, call, broken)

    def lack(self, call: str) -> None:
        """Be a binding without this function."""
        self.fail(call, AttributeError(f"module 'pynvml' has no attribute '{call}'"))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
        """Be the module that is imported."""
        monkeypatch.setitem(sys.modules, "pynvml", self)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return self

    def nvmlInit(self) -> None:
        self.n_open += 1

    def nvmlShutdown(self) -> None:
        self.n_open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return self.n_gpus

    def nvmlDeviceGetHandleByIndex(self, i: int) -> int:
        return i

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        return f"NVIDIA GeForce RTX 4090 #{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        used = self.used[handle]
        return SimpleNamespace(total=24 * GIB, free=24 * GIB - used, used=used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=self.mine[handle])
        return [SimpleNamespace(pid=1, usedGpuMemory=77), mine]

    def nvmlDeviceGetMemoryBusWidth(self, handle: int) -> int:
        return 384

    def nvmlDeviceGetMaxClockInfo(self, handle: int, kind: int) -> int:
        return 10501 if kind == self.NVML_CLOCK_MEM else 3105

    def nvmlDeviceGetNumGpuCores(self, handle: int) -> int:
        return 16384
