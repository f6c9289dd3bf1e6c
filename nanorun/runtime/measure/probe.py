"""Asks the engine itself what a context would take: `python -m nanorun.runtime.measure.probe`.

Runs in a process of its own, because the engine aborts on what it does not like, and its log, where
the answer stands, is global. One JSON request on stdin, one JSON answer on stdout:

    {"verb": "probe", "path", "contexts"}              reckons without loading weights
    {"verb": "measure", "path", "contexts", "n_fill"}  loads and decodes for real
    {"verb": "devices"}                                lists what the engine can use

A context is `{"options": fields of EngineOptions, "head": whether it is the MTP head's}`. The first
one's options place the layers.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanorun.errors import EngineError, NanorunError, UsageError
from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.llama.binding import engine_log, load_llama
from nanorun.runtime.llama.params import context_params, model_params
from nanorun.runtime.measure.process_memory import (
    GpuMemory,
    peak_resident,
    proportional_bytes,
    resident_bytes,
)

_MIB = 2**20
_LOAD_NONE = 0
_N_DECODED = 16
_N_LOG_LINES = 20_000

# The engine's own report, one line a buffer.
_BUFFERS = {
    "kv": re.compile(r"llama_kv_cache: size = +([\d.]+) MiB"),
    "state": re.compile(r"llama_memory_recurrent: size = +([\d.]+) MiB"),
    "output": re.compile(r"output buffer size = +([\d.]+) MiB"),
}
_COMPUTE = re.compile(r"(\S+) compute buffer size = +([\d.]+) MiB")
_WEIGHTS = re.compile(r"(\S+) model buffer size = +([\d.]+) MiB")
# By device, and only of what is really allocated.
_ALLOCATED = {
    "kv": re.compile(r"(\S+) KV buffer size = +([\d.]+) MiB"),
    "state": re.compile(r"(\S+) RS buffer size = +([\d.]+) MiB"),
    "compute": _COMPUTE,
    "output": re.compile(r"(\S+) +output buffer size = +([\d.]+) MiB"),
}


@dataclass(frozen=True, slots=True)
class ProbedContext:
    """One context that the engine is asked about."""

    options: EngineOptions
    head: bool
    """Whether it is the context of the model's MTP head."""


def main() -> int:
    """Answer one request."""
    # The report of one context alone is longer than what is kept otherwise.
    engine_log.lines = deque(maxlen=_N_LOG_LINES)
    try:
        answer = _answer(json.load(sys.stdin))
    except NanorunError as error:
        answer = {"error": error.message, "facts": list(error.facts)}
    sys.stdout.write(json.dumps(answer))
    return 0


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    verb = request.get("verb")
    if verb == "devices":
        return {"devices": devices()}
    if verb == "probe":
        return {"contexts": probe(Path(request["path"]), _contexts(request))}
    if verb == "measure":
        return measure(Path(request["path"]), _contexts(request), request["n_fill"])
    raise UsageError(f"there is no verb {verb!r}")


def _contexts(request: dict[str, Any]) -> list[ProbedContext]:
    return [ProbedContext(EngineOptions(**c["options"]), c["head"]) for c in request["contexts"]]


def probe(path: Path, contexts: Sequence[ProbedContext]) -> list[dict[str, Any]]:
    """What each context would take, by the engine's own reckoning; no weight is read.

    Raises:
        EngineError: If the engine refuses the file or a context.
    """
    with _model(path, contexts[0].options, for_real=False) as model:
        return [_probe_context(model, context) for context in contexts]


def _probe_context(model: Any, context: ProbedContext) -> dict[str, Any]:
    with _opened(model, context):
        return _reported()


def measure(path: Path, contexts: Sequence[ProbedContext], n_fill: int) -> dict[str, Any]:
    """Load for real, fill a stretch of the first context, decode a little: memory and speed.

    Bytes of weights and of the context are by the engine's name of the buffer they lie in.

    Raises:
        EngineError: If the engine cannot.
    """
    llama = load_llama()
    base, gpus = resident_bytes(), GpuMemory()
    with peak_resident() as peak:
        started = time.perf_counter()
        options = contexts[0].options
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


def devices() -> list[dict[str, Any]]:
    """The devices that this build of the engine can use, with the memory it sees."""
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
    handle = llama.llama_model_load_from_file(str(path).encode(), params)
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


def _reported() -> dict[str, Any]:
    """Bytes of each kind of buffer, from the log of the context that was opened last."""
    text = "\n".join(line for _, line in engine_log.lines)
    report: dict[str, Any] = {}
    for part, pattern in _BUFFERS.items():
        report[part] = sum(round(float(mib) * _MIB) for mib in pattern.findall(text))
    report["compute"] = _sums(_COMPUTE)
    return report


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


if __name__ == "__main__":
    sys.exit(main())
