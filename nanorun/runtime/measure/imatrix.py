"""Collecting an importance matrix: run a text through a model and add up what its matrices see.

ggml's scheduler asks a callback about every operation. For the products of weights with activations
it gives us the activations; experts are told apart by the ids that routed them. What is added up
and how is that of llama.cpp's `llama-imatrix`, so the files agree.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanorun.errors import EngineError, UsageError
from nanorun.model.engine_options import EngineOptions
from nanorun.model.ggml_type import GgmlType
from nanorun.runtime.llama.binding import load_llama
from nanorun.runtime.llama.context import Context
from nanorun.runtime.llama.ggml_tensor import Tensor, plain_name, tensor_library
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.llama.row import Row
from nanorun.runtime.measure.perplexity import Source
from nanorun.runtime.process.job import run_job
from nanorun_quant.imatrix import Imatrix, gram_name
from nanorun_quant.imatrix_file import read_imatrix, write_imatrix

_N_BATCH = 256
"""Rows of a decode. llama-imatrix passes over products of fewer than 16 rows."""
_MIN_ROWS = 16
_SAVE_EVERY = 16
"""Chunks between two writes of the file."""
_STOP_S = 60.0
"""Time that a stopped run may take to finish its chunk and write the file."""
_MUL_MAT, _MUL_MAT_ID = b"MUL_MAT", b"MUL_MAT_ID"
# Beside the blocks: the output, or the embedding where it is that too.
_OUTSIDE = ("output.weight", "token_embd.weight")


def collect_imatrix(
    path: Path,
    text: str,
    dataset: str,
    out: Path,
    n_ctx: int = 512,
    options: EngineOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    special: bool = False,
    grams: bool = False,
) -> Imatrix:
    """Collect the imatrix of a model on a text into a file, in a child process.

    A file of the same text that was left unfinished is continued.

    Args:
        path: The model.
        text: What to run through it.
        dataset: What to call the text in the file.
        out: The file, written every few chunks, and when the run is stopped.
        n_ctx: Tokens of a chunk.
        options: Threads and types.
        progress: Called with chunks done and chunks in all.
        special: Whether texts of control tokens become control tokens.
        grams: Whether to collect the Gram matrices of inputs too, in memory until they are written.

    Raises:
        UsageError: If the text is too short, or `out` is of another text, or without matrices.
        ModelError: If the model or the file cannot be used.
        EngineDied: If the engine's process ended; what it wrote of `out` stays.
    """
    arguments = {
        "path": str(path), "text": text, "dataset": dataset, "out": str(out), "n_ctx": n_ctx,
        "options": asdict(options or EngineOptions()), "special": special, "grams": grams,
    }  # fmt: skip
    run_job(_job, arguments, progress, stop_s=_STOP_S)
    return read_imatrix(out)


def _job(arguments: dict[str, Any], progress: Callable[[int, int], None]) -> None:
    source = Source(arguments["text"], arguments["n_ctx"], special=arguments["special"])
    options = EngineOptions(**arguments["options"])
    out = Path(arguments["out"])
    collect_here(
        Path(arguments["path"]), source, arguments["dataset"], out, options, progress,
        grams=arguments["grams"],
    )  # fmt: skip


def collect_here(
    path: Path,
    source: Source,
    dataset: str,
    out: Path,
    options: EngineOptions,
    progress: Callable[[int, int], None] | None = None,
    *,
    grams: bool = False,
) -> None:
    """Do the work of `collect_imatrix` in this process."""
    model = LoadedModel(path, options)
    try:
        chunks = source.chunks(model)
        n_chunk = len(chunks[0])
        if n_chunk < _MIN_ROWS:
            raise UsageError(f"a text of {n_chunk} tokens is too short for an imatrix")
        imatrix = _started(out, source.sha256, dataset, n_chunk, grams)
        collector = _Collector(imatrix, model, grams or bool(imatrix.grams))
        sizes = replace(
            options, n_ctx=n_chunk, n_parallel=1, n_seq_spare=0, n_batch=_N_BATCH, n_ubatch=_N_BATCH
        )
        context = Context(model, sizes, n_outputs_max=_N_BATCH, eval_callback=collector.callback)
        try:
            _run(context, chunks, imatrix, collector, out, progress)
        finally:
            context.close()
    finally:
        model.close()


def _started(out: Path, digest: str, dataset: str, chunk_size: int, grams: bool) -> Imatrix:
    """The imatrix in `out`, if it is of the text of this digest, or a new one."""
    if not out.exists():
        return Imatrix({}, (dataset,), chunk_size, 0, str(out), digest)
    found = read_imatrix(out)
    if found.text_sha256 != digest or found.chunk_size != chunk_size:
        raise UsageError(
            f"{out} exists already, and is of another text or chunk size",
            facts=[f"its text: {', '.join(found.datasets) or 'not said'}"],
            tries=[f"rm {out}"],
        )
    if grams and not found.grams:
        raise UsageError(f"{out} was begun without --gram", tries=[f"rm {out}"])
    return found


def _run(
    context: Context,
    chunks: list[list[int]],
    imatrix: Imatrix,
    collector: _Collector,
    out: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    n_written = imatrix.n_chunks
    # Gram matrices are gigabytes to write.
    save_every = _SAVE_EVERY * (_SAVE_EVERY if collector.wants_grams else 1)
    try:
        while imatrix.n_chunks < len(chunks):
            collector.begin()
            _read(context, chunks[imatrix.n_chunks])
            collector.commit()
            if imatrix.n_chunks % save_every == 0:
                write_imatrix(out, imatrix)
                n_written = imatrix.n_chunks
            if progress is not None:
                progress(imatrix.n_chunks, len(chunks))
    finally:
        # Also when it is stopped: whole chunks are kept, and continued from.
        if imatrix.n_chunks > n_written:
            write_imatrix(out, imatrix)


def _read(context: Context, chunk: list[int]) -> None:
    context.drop(0)
    # In equal parts: a remainder of a few rows would be passed over.
    n_batches = -(-len(chunk) // _N_BATCH)
    bounds = [i * len(chunk) // n_batches for i in range(n_batches + 1)]
    for start, end in pairwise(bounds):
        context.decode([Row(0, start, chunk[start:end], wants_logits=True, all_logits=True)])


class _Collector:
    """The callback, and the sums of one chunk until it is whole."""

    def __init__(self, imatrix: Imatrix, model: LoadedModel, wants_grams: bool) -> None:
        self.imatrix = imatrix
        self.wants_grams = wants_grams
        self._is_latent = model.arch.n_latent > 0
        self._chunk = Imatrix()
        self._inputs: dict[str, list[NDArray[np.float32]]] = {}
        """Inputs of the chunk, by the tensor that their Gram matrix is for."""
        self._error: Exception | None = None
        self._lib = tensor_library()
        self._ops = self._lib.ops(_MUL_MAT, _MUL_MAT_ID)
        self.callback = load_llama().ggml_backend_sched_eval_callback(self._call)

    def begin(self) -> None:
        """Start a chunk."""
        self._chunk = Imatrix()
        self._inputs = {}

    def commit(self) -> None:
        """Add the chunk to the imatrix.

        Raises:
            EngineError: If the callback failed in it.
        """
        if self._error is not None:
            raise EngineError("the activations could not be read") from self._error
        self.imatrix.merge(self._chunk)
        while self._inputs:
            name, inputs = self._inputs.popitem()
            self.imatrix.add_gram(name, np.concatenate(inputs))
        self.imatrix.n_chunks += 1

    def _call(self, pointer: int, ask: bool, _data: object) -> bool:
        # An exception must not pass through C.
        try:
            tensor = ctypes.cast(pointer, ctypes.POINTER(Tensor)).contents
            if ask:
                return self._wants(tensor)
            self._take(tensor)
        except Exception as error:
            self._error = self._error or error
        return True

    def _wants(self, tensor: Tensor) -> bool:
        op = self._ops.get(tensor.op)
        if op is None:
            return False
        inputs = tensor.src[1].contents
        if op == _MUL_MAT and inputs.ne[1] < _MIN_ROWS:
            return False
        name = plain_name(tensor.src[0].contents.name)
        is_weight = name.startswith("blk.") or name in _OUTSIDE
        return is_weight and inputs.type == GgmlType.F32

    def _take(self, tensor: Tensor) -> None:
        weight = tensor.src[0].contents
        name, n_mat = plain_name(weight.name), int(weight.ne[2])
        # (n_token, n_used or 1, n_per_row) for experts, (1, n_token, n_per_row) otherwise.
        inputs = self._lib.read(tensor.src[1], np.dtype("<f4"))
        if self._ops[tensor.op] == _MUL_MAT:
            inputs = inputs.reshape(-1, inputs.shape[-1])
            self._chunk.add(name, 0, 1, inputs)
            self._keep(name, inputs)
            return
        ids = self._lib.read(tensor.src[2], np.dtype("<i4")).reshape(inputs.shape[1], -1)
        inputs = inputs[0]
        n_slots = inputs.shape[1]
        if n_slots == 1:
            self._keep(name, inputs[:, 0])
        for expert in np.unique(ids):
            i_token, i_used = np.nonzero(ids == expert)
            self._chunk.add(name, int(expert), n_mat, inputs[i_token, i_used % n_slots])

    def _keep(self, name: str, inputs: NDArray[np.float32]) -> None:
        """Keep the inputs of a tensor whose name its Gram matrix goes by."""
        if self.wants_grams and gram_name(name, is_latent=self._is_latent) == name:
            self._inputs.setdefault(name, []).append(inputs.copy())
