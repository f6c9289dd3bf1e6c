"""NVIDIA's management library (NVML): any of its calls may fail, and none may stop the rest.

Every question goes through `Nvml`. What it cannot answer is kept as a fault, with what that
means, for `nanorun doctor`; the CPU and the GPUs that answer are used as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from nanorun.model.cuda import visible_gpus

# nvmlReturn_t of nvml.h
_NOT_SUPPORTED = 3
_LIBRARY_NOT_FOUND = 12
_CAUSES = {
    4: "this user or container may not ask the driver",
    9: "the driver's kernel module is not loaded",
    10: "the GPU did not react in time",
    13: "the driver is too old for this question",
    15: "it fell off the bus, and a restart of the machine brings it back",
    16: "it has to be reset: sudo nvidia-smi --gpu-reset",
    17: "the operating system, a control group say, keeps it from this process",
    18: "the driver was updated while it ran, and a restart of the machine mends it",
    20: "the driver has no memory left",
    999: "the driver does not say why, but nvidia-smi or the kernel's log may",
}
_NO_GPU = "no NVIDIA GPU is used"
_LEFT_OUT = "this GPU is not used"
_SLOWNESS = "how fast this GPU is cannot be estimated"
_EFFECTS = {
    "nvmlInit": _NO_GPU,
    "nvmlDeviceGetCount": _NO_GPU,
    "nvmlDeviceGetHandleByIndex": _LEFT_OUT,
    "nvmlDeviceGetMemoryInfo": _LEFT_OUT,
    "nvmlDeviceGetName": "the GPU is used all the same, under what can be read of its name",
    "nvmlDeviceGetMemoryBusWidth": _SLOWNESS,
    "nvmlDeviceGetMaxClockInfo": _SLOWNESS,
    "nvmlDeviceGetNumGpuCores": _SLOWNESS,
    "nvmlDeviceGetComputeRunningProcesses": "what nanorun takes of this GPU is estimated",
    "nvmlShutdown": "nothing is lost",
}

_FAILED = object()


@dataclass(frozen=True, slots=True)
class NvmlFault:
    """One question that NVIDIA's driver, or the binding to it, did not answer."""

    call: str
    """`nvmlDeviceGetName` or, of one GPU, `nvmlDeviceGetName of GPU 1`, as the driver counts."""
    reason: str
    """In NVML's words, or Python's."""
    meaning: str
    """What it comes from, where that is known, and what it leads to."""
    costs_gpu: bool
    """Whether a GPU that is there is not used because of it."""

    def __str__(self) -> str:
        return f"NVIDIA's driver failed in {self.call} ({self.reason}): {self.meaning}"


@dataclass(frozen=True, slots=True)
class NvmlGpu:
    """One GPU that CUDA shows to this process."""

    i_driver: int
    """Its number for the driver, which is not its number for CUDA."""
    handle: Any


@dataclass(frozen=True, slots=True)
class GpuMemoryInfo:
    """Memory of one GPU in bytes; all zero where it has none of its own (GB10, Jetson)."""

    total: int
    free: int
    used: int


class Nvml:
    """What the driver says while the library is open; `open_nvml` opens it."""

    def __init__(self) -> None:
        self._binding: Any = None
        self.faults: list[NvmlFault] = []
        """What was not answered so far; that something is not supported is an answer."""

    def open(self) -> None:
        """Load the binding and the driver's library; where there is none, there is no fault."""
        try:
            binding = import_module("pynvml")
            binding.nvmlInit()
        except ImportError:
            return
        except Exception as error:  # foreign code: ctypes, old bindings and drivers raise anything
            if _code(error) != _LIBRARY_NOT_FOUND:
                self._note("nvmlInit", error)
            return
        self._binding = binding

    def close(self) -> None:
        """Let go of the driver; its handles mean nothing any more."""
        if self._binding is not None:
            self._call("nvmlShutdown")
            self._binding = None

    def gpus(self) -> list[NvmlGpu]:
        """The GPUs that answer, in CUDA's order; one that is lost has no number there either."""
        if self._binding is None:
            return []
        n_gpus = self._call("nvmlDeviceGetCount")
        indices = visible_gpus(n_gpus) if isinstance(n_gpus, int) else []
        handles = [(i, self._call("nvmlDeviceGetHandleByIndex", i, i_driver=i)) for i in indices]
        return [NvmlGpu(i, handle) for i, handle in handles if handle is not _FAILED]

    def ask(self, call: str, gpu: NvmlGpu, *args: Any) -> Any:
        """What a function says about a GPU; None where it does not.

        Args:
            call: The function's name.
            gpu: Its first argument.
            args: The others.
        """
        answer = self._call(call, gpu.handle, *args, i_driver=gpu.i_driver)
        return None if answer is _FAILED else answer

    def name(self, gpu: NvmlGpu) -> str:
        """What the GPU is called, as far as it is text."""
        name = self.ask("nvmlDeviceGetName", gpu) or ""
        text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        readable = "".join(c for c in text if c.isprintable()).strip(" \N{REPLACEMENT CHARACTER}")
        return readable or "NVIDIA GPU"

    def memory(self, gpu: NvmlGpu) -> GpuMemoryInfo | None:
        """The GPU's memory; None where the driver failed."""
        info = self._call("nvmlDeviceGetMemoryInfo", gpu.handle, i_driver=gpu.i_driver)
        if info is _FAILED:
            return None
        numbers = (getattr(info, field, None) or 0 for field in ("total", "free", "used"))
        return GpuMemoryInfo(*map(int, numbers))

    def clock_mhz(self, gpu: NvmlGpu, kind: str) -> int:
        """The most that a clock runs at; 0 if unknown.

        Args:
            gpu: The GPU.
            kind: `MEM` or `SM`.
        """
        number = getattr(self._binding, f"NVML_CLOCK_{kind}", None)
        return self.ask("nvmlDeviceGetMaxClockInfo", gpu, number) or 0

    def _call(self, call: str, *args: Any, i_driver: int | None = None) -> Any:
        """What a function says; None where that is "not supported", `_FAILED` where it failed."""
        try:
            return getattr(self._binding, call)(*args)
        except UnicodeDecodeError as error:  # names, seen under WSL; the exception has the bytes
            self._note(call, error, i_driver)
            return error.object
        except Exception as error:  # as in `open`
            if _code(error) == _NOT_SUPPORTED:
                return None
            self._note(call, error, i_driver)
            return _FAILED

    def _note(self, call: str, error: Exception, i_driver: int | None = None) -> None:
        effect = _EFFECTS[call]
        cause = _cause(error)
        fault = NvmlFault(
            call if i_driver is None else f"{call} of GPU {i_driver}",
            _reason(error),
            f"{cause}; {effect}" if cause else effect,
            costs_gpu=effect in (_NO_GPU, _LEFT_OUT),
        )
        if fault not in self.faults:
            self.faults.append(fault)


@contextmanager
def open_nvml() -> Iterator[Nvml]:
    """The library for the time of a `with` block; without a driver it knows of no GPU."""
    nvml = Nvml()
    nvml.open()
    try:
        yield nvml
    finally:
        nvml.close()


def _code(error: Exception) -> int | None:
    """NVML's number of an error that came from it."""
    value = getattr(error, "value", None)
    return value if isinstance(value, int) else None


def _cause(error: Exception) -> str:
    if isinstance(error, AttributeError):
        return "the installed nvidia-ml-py lacks it: pip install --upgrade nvidia-ml-py"
    if isinstance(error, UnicodeDecodeError):
        return "the driver gave a text that is not UTF-8"
    return _CAUSES.get(_code(error) or 0, "")


def _reason(error: Exception) -> str:
    try:
        return str(error) or type(error).__name__
    except Exception:  # the binding asks the library for the text, which may fail as well
        return type(error).__name__
