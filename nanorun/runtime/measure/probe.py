"""Asks the engine itself what a context would take, and measures what it took.

Each question is a job in a process of its own, because the engine aborts on what it does not like,
and its log, where the answer stands, is global.
"""

from __future__ import annotations

import ctypes
import re
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanorun.errors import EngineError
from nanorun.model.engine_options import EngineOptions
from nanorun.model.measurement import PROBED, Measurement
from nanorun.runtime.llama.binding import engine_log, load_llama
from nanorun.runtime.llama.loaded_model import load_weights
from nanorun.runtime.llama.params import context_params, model_params
from nanorun.runtime.measure.process_memory import (
    GpuMemory,
    peak_resident,
    proportional_bytes,
    resident_bytes,
)
from nanorun.runtime.process.job import Report, run_job

_TIMEOUT_S = 180.0
_MEASURE_TIMEOUT_S = 3600.0
_MIB = 2**20
_LOAD_NONE = 0
_N_DECODED = 16
_N_LOG_LINES = 20_000

# The engine's own report, one line a buffer.
_BUFFERS = {
    "kv": re.compile(r"llama_kv_cache: size = +([\d.]+) MiB"),
    "state": re.compile(r"llama_memory_recurrent: size = +([\d.]+) MiB"),
    "compute": re.compile(r"\S+ compute buffer size = +([\d.]+) MiB"),
    "output": re.compile(r"output buffer size = +([\d.]+) MiB"),
}
_WEIGHTS = re.compile(r"(\S+) model buffer size = +([\d.]+) MiB")
# By device, and only of what is really allocated.
_ALLOCATED = {
    "kv": re.compile(r"(\S+) KV buffer size = +([\d.]+) MiB"),
    "state": re.compile(r"(\S+) RS buffer size = +([\d.]+) MiB"),
    "compute": re.compile(r"(\S+) compute buffer size = +([\d.]+) MiB"),
    "output": re.compile(r"(\S+) +output buffer size = +([\d.]+) MiB"),
}


@dataclass(frozen=True, slots=True)
class ProbedContext:
    """One context that the engine is asked about."""

    options: EngineOptions
    head: bool
    """Whether it is the context of the model's MTP head."""


def probe_contexts(
    path: Path, contexts: Sequence[EngineOptions], *, head: bool = False
) -> list[dict[str, int]]:
    """What the engine says each context would take, on all devices, without loading weights.

    Args:
        path: The model, or a file with no more than its header.
        contexts: At least one; all place the layers as the first does.
        head: Ask about the contexts of the model's MTP head instead of the main ones.

    Returns:
        Bytes of each of `PROBED`, for each context.

    Raises:
        EngineError: If the engine refuses, or dies.
    """
    return _probe(path, [ProbedContext(options, head) for options in contexts])


def probe_plan(path: Path, options: EngineOptions) -> dict[str, int]:
    """Bytes of each of `PROBED` for a model as it is run: its context and that of its MTP head."""
    contexts = _probe(path, _contexts(options))
    return {part: sum(context[part] for context in contexts) for part in PROBED}


def measure(path: Path, options: EngineOptions, n_fill: int) -> Measurement:
    """Load a model for real, fill `n_fill` tokens of its context, and decode a little.

    Raises:
        EngineError: If the engine cannot.
        EngineOutOfMemory: If memory ran out.
    """
    arguments = {**_arguments(path, _contexts(options)), "n_fill": n_fill}
    return Measurement(**run_job(_measure_job, arguments, timeout_s=_MEASURE_TIMEOUT_S))


def engine_devices() -> list[dict[str, Any]]:
    """The devices that this build of the engine can use, with the memory it sees.

    Raises:
        EngineError: If it cannot be loaded.
    """
    devices: list[dict[str, Any]] = run_job(_devices_job, {}, timeout_s=_TIMEOUT_S)
    return devices


def _probe(path: Path, contexts: Sequence[ProbedContext]) -> list[dict[str, int]]:
    found: list[dict[str, int]] = run_job(
        _probe_job, _arguments(path, contexts), timeout_s=_TIMEOUT_S
    )
    return found


def _contexts(options: EngineOptions) -> list[ProbedContext]:
    """The contexts of a model as it is run."""
    heads = (False, True) if options.with_mtp else (False,)
    return [ProbedContext(options, head) for head in heads]


def _arguments(path: Path, contexts: Sequence[ProbedContext]) -> dict[str, Any]:
    return {"path": str(path), "contexts": [asdict(context) for context in contexts]}


# -- in the child -------------------------------------------------------------------------------


def _taken(arguments: dict[str, Any]) -> tuple[Path, list[ProbedContext]]:
    """What `_arguments` packed; the engine's log is kept long enough for its report."""
    engine_log.lines = deque(maxlen=_N_LOG_LINES)
    contexts = [
        ProbedContext(EngineOptions(**context["options"]), context["head"])
        for context in arguments["contexts"]
    ]
    return Path(arguments["path"]), contexts


def _probe_job(arguments: dict[str, Any], _progress: Report) -> list[dict[str, int]]:
    path, contexts = _taken(arguments)
    with _model(path, contexts[0].options, for_real=False) as model:
        return [_probe_context(model, context) for context in contexts]


def _probe_context(model: Any, context: ProbedContext) -> dict[str, int]:
    """Bytes of each of `PROBED`, from the log of the context that was opened last."""
    with _opened(model, context):
        text = "\n".join(line for _, line in engine_log.lines)
    return {
        part: sum(round(float(mib) * _MIB) for mib in pattern.findall(text))
        for part, pattern in _BUFFERS.items()
    }


def _measure_job(arguments: dict[str, Any], _progress: Report) -> dict[str, Any]:
    """The fields of a `Measurement`; the first context is the one that is filled."""
    path, contexts = _taken(arguments)
    options, n_fill = contexts[0].options, arguments["n_fill"]
    llama = load_llama()
    base, gpus = resident_bytes(), GpuMemory()
    with peak_resident() as peak:
        started = time.perf_counter()
        with _model(path, options, for_real=True) as model, ExitStack() as stack:
            weights = _sums(_WEIGHTS)
            load_s = time.perf_counter() - started
            allocated: dict[str, Counter[str]] = {part: Counter() for part in _ALLOCATED}
            opened = []
            for context in contexts:
                opened.append(stack.enter_context(_opened(model, context)))
                for part, pattern in _ALLOCATED.items():
                    allocated[part].update(_sums(pattern))
            prefill_s = _prefill(llama, opened[0], n_fill, options.n_ubatch)
            decode_s = _decode(llama, opened[0], n_fill)
            resident, proportional = resident_bytes(), proportional_bytes()
            gpu_bytes = gpus.taken()
    return {
        "weights": weights,
        **allocated,
        "base_bytes": base,
        "resident_bytes": resident,
        "proportional_bytes": proportional,
        "peak_bytes": max(peak[0], resident),
        "gpu_bytes": gpu_bytes,
        "load_s": load_s,
        "prefill_tps": n_fill / prefill_s,
        "decode_tps": _N_DECODED / decode_s,
    }


def _devices_job(_arguments: dict[str, Any], _progress: Report) -> list[dict[str, Any]]:
    llama = load_llama()
    ggml = _ggml(llama)
    found = []
    for i in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(i)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        found.append(
            {
                "name": ggml.ggml_backend_dev_name(device).decode(),
                "description": ggml.ggml_backend_dev_description(device).decode(),
                "type": ("cpu", "gpu", "igpu", "accel")[ggml.ggml_backend_dev_type(device) & 3],
                "free_bytes": free.value,
                "total_bytes": total.value,
            }
        )
    return found


def _ggml(llama: Any) -> Any:
    ggml = llama._lib  # on Linux and macOS libllama resolves what its own dependencies export
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.argtypes = (ctypes.c_size_t,)
    ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    for name in ("name", "description"):
        function = getattr(ggml, f"ggml_backend_dev_{name}")
        function.argtypes, function.restype = (ctypes.c_void_p,), ctypes.c_char_p
    ggml.ggml_backend_dev_type.argtypes = (ctypes.c_void_p,)
    ggml.ggml_backend_dev_memory.argtypes = (ctypes.c_void_p,) * 3
    ggml.ggml_backend_dev_memory.restype = None
    return ggml


# -- opening ------------------------------------------------------------------------------------


@contextmanager
def _model(path: Path, options: EngineOptions, *, for_real: bool) -> Iterator[Any]:
    llama = load_llama()
    params = model_params(llama, options)
    params.no_alloc = not for_real
    # Mapped, the weights that the engine rearranges for the processor would be resident twice.
    params.load_mode = _LOAD_NONE
    engine_log.clear()
    handle = load_weights(llama, path, params)
    if not handle:
        raise EngineError(
            f"{path.name} could not be opened by llama.cpp", facts=engine_log.problems()
        )
    try:
        yield handle
    finally:
        llama.llama_model_free(handle)


@contextmanager
def _opened(model: Any, context: ProbedContext) -> Iterator[Any]:
    llama = load_llama()
    params = context_params(llama, context.options, head=context.head)
    engine_log.clear()
    handle = llama.llama_init_from_model(model, params)
    if not handle:
        raise EngineError("a context could not be opened", facts=engine_log.problems())
    try:
        yield handle
    finally:
        llama.llama_free(handle)


def _sums(pattern: re.Pattern[str]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for _, line in engine_log.lines:
        for device, mib in pattern.findall(line):
            sums[device] = sums.get(device, 0) + round(float(mib) * _MIB)
    return sums


# -- running ------------------------------------------------------------------------------------


def _prefill(llama: Any, context: Any, n_tokens: int, n_batch: int) -> float:
    n_vocab = _n_vocab(llama, context)
    started = time.perf_counter()
    for start in range(0, n_tokens, n_batch):
        # Spread over the vocabulary, so that a real router sends them to many experts.
        tokens = [(start + i) * 7919 % n_vocab for i in range(min(n_batch, n_tokens - start))]
        _evaluate(llama, context, tokens, start)
    return time.perf_counter() - started


def _decode(llama: Any, context: Any, n_past: int) -> float:
    n_vocab = _n_vocab(llama, context)
    _evaluate(llama, context, [1], n_past)  # the first one sets its threads and buffers up
    started = time.perf_counter()
    for i in range(_N_DECODED):
        _evaluate(llama, context, [(i + 3) * 104729 % n_vocab], n_past + 1 + i)
    return time.perf_counter() - started


def _evaluate(llama: Any, context: Any, tokens: list[int], pos: int) -> None:
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, pos + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i == len(tokens) - 1
        code = llama.llama_decode(context, batch)
    finally:
        llama.llama_batch_free(batch)
    if code:
        raise EngineError(f"llama_decode failed with {code}", facts=engine_log.problems())


def _n_vocab(llama: Any, context: Any) -> int:
    model = llama.llama_get_model(context)
    return int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model)))
