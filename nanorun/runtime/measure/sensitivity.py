"""How much noise in one tensor changes a model's predictions: measured, tensor by tensor.

A model is loaded in memory of its own. One tensor's weights are rounded, about as coarsely as a
2-bit type does it; some chunks of the text are predicted; the KL divergence from the predictions
before, for the noise that the rounding made, is noted; and the weights are put back. So what a
tensor is for, where it stands and what later layers make of its error is measured, not modelled.
The figures go into the imatrix file, for `nanorun convert --target-size`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanorun.errors import UsageError
from nanorun.model.engine_options import EngineOptions
from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import TensorInfo
from nanorun.model.tensor_roles import expected_tensors
from nanorun.runtime.llama.binding import load_llama
from nanorun.runtime.llama.context import Context
from nanorun.runtime.llama.ggml_tensor import Tensor, plain_name, tensor_library
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.measure.divergence import decoded_divergences, encoded_predictions
from nanorun.runtime.measure.perplexity import N_ROWS, Source, chunk_predictions, log_softmax
from nanorun.runtime.process.job import run_job
from nanorun_quant.ggml import load_ggml
from nanorun_quant.imatrix import Imatrix
from nanorun_quant.imatrix_file import read_imatrix, write_imatrix

Progress = Callable[[str, int, int], None]

_N_LEVELS = 4
"""Levels that a block is rounded to: noise of about 0.2 of the weights' power. Finer ones are no
better measure: a few tokens that change their experts are then all there is to see."""
_BLOCK = 32
_PIECE_ELEMENTS = 2**22
_OPS = (b"MUL_MAT", b"MUL_MAT_ID", b"GET_ROWS")
# Written back exactly, and at any place: the engine keeps them as they are in the file.
_WRITABLE = (GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0)
_SAVE_EVERY = 8
_STOP_S = 120.0


def measure_sensitivity(
    path: Path,
    source: Source,
    imatrix: Path,
    n_chunks: int,
    options: EngineOptions,
    progress: Progress | None = None,
) -> Imatrix:
    """Add each tensor's sensitivity to an imatrix file, in a child process.

    Tensors that the file knows the sensitivity of already are passed over, so a run that was
    stopped is continued.

    Args:
        path: The model, in F32, F16, BF16 or Q8_0.
        source: The text that the imatrix is of.
        imatrix: The file.
        n_chunks: Chunks of the text to predict, spread over it.
        options: Threads and types.
        progress: Called with a tensor, how many are done, and how many there are.

    Raises:
        UsageError: If the imatrix is of another text, or the model quantized too far.
        ModelError: If a file cannot be used.
        EngineDied: If the engine's process ended.
    """
    arguments = {
        "path": str(path), "source": asdict(source), "imatrix": str(imatrix),
        "n_chunks": n_chunks, "options": asdict(options),
    }  # fmt: skip
    run_job(_job, arguments, progress, stop_s=_STOP_S)
    return read_imatrix(imatrix)


def _job(arguments: dict[str, Any], progress: Progress) -> None:
    source, options = Source(**arguments["source"]), EngineOptions(**arguments["options"])
    out = Path(arguments["imatrix"])
    imatrix = read_imatrix(out)
    if imatrix.text_sha256 != source.sha256:
        raise UsageError(f"{out} is of another text", tries=[f"rm {out}"])
    with _Subject.opened(
        Path(arguments["path"]), source, arguments["n_chunks"], options
    ) as subject:
        names = subject.names
        try:
            for i, name in enumerate(names):
                progress(name, i, len(names))
                if name not in imatrix.sensitivity:
                    imatrix.sensitivity[name] = subject.sensitivity(name, imatrix)
                    if i % _SAVE_EVERY == 0:
                        write_imatrix(out, imatrix)
        finally:
            write_imatrix(out, imatrix)


class _Subject:
    """A loaded model whose weights may be changed, and its predictions before they were."""

    def __init__(
        self,
        model: LoadedModel,
        context: Context,
        chunks: list[list[int]],
        addresses: dict[str, int],
    ) -> None:
        self._model = model
        self._context = context
        self._chunks = chunks
        self._addresses = addresses
        self._before = [
            encoded_predictions(part.logits)
            for chunk in chunks
            for part in chunk_predictions(context, chunk)
        ]

    @classmethod
    @contextmanager
    def opened(
        cls, path: Path, source: Source, n_chunks: int, options: EngineOptions
    ) -> Iterator[_Subject]:
        """The model at `path`, with `n_chunks` of the text read once."""
        model = LoadedModel(path, options, writable=True)
        try:
            chunks = _spread(source.chunks(model), n_chunks)
            sizes = replace(
                options, n_ctx=len(chunks[0]), n_parallel=1, n_seq_spare=0, n_batch=N_ROWS,
                n_ubatch=N_ROWS,
            )  # fmt: skip
            finder = _Finder(_quantizable(model))
            context = Context(model, sizes, n_outputs_max=N_ROWS, eval_callback=finder.callback)
            try:
                yield cls(model, context, chunks, finder.addresses)
            finally:
                context.close()
        finally:
            model.close()

    @property
    def names(self) -> list[str]:
        """The tensors that can be changed, in file order."""
        return [name for name in self._model.gguf.tensors if name in self._addresses]

    def sensitivity(self, name: str, imatrix: Imatrix) -> float:
        """Divergence of the tensor's rounding, for its noise."""
        tensor = self._model.gguf.tensors[name]
        try:
            noise = self._round(tensor, imatrix)
            return self._divergence() / noise if noise else 0.0
        finally:
            self._restore(tensor)

    def _divergence(self) -> float:
        parts = (part for chunk in self._chunks for part in chunk_predictions(self._context, chunk))
        values = [
            decoded_divergences(before, log_softmax(part.logits))
            for before, part in zip(self._before, parts, strict=True)
        ]
        return max(0.0, float(np.concatenate(values).mean()))

    def _round(self, tensor: TensorInfo, imatrix: Imatrix) -> float:
        """Round a tensor's weights; what that is in noise to its output, against the output."""
        ggml, n_per_row = load_ggml(), tensor.shape[-1]
        n_mat = tensor.shape[0] if len(tensor.shape) == 3 else 1
        shares = imatrix.shares(tensor.name, n_mat)
        noise = signal = 0.0
        for i_mat, offset, raw in _pieces(tensor, n_mat):
            rows = ggml.dequantize(raw, tensor.type, n_per_row)
            changed = ggml.quantize(_rounded(rows), tensor.type)
            tensor_library().write(self._addresses[tensor.name], offset, changed)
            weights = imatrix.weights(tensor.name, i_mat, n_per_row)
            weights = np.ones(n_per_row, np.float32) if weights is None else weights
            error = ggml.dequantize(changed, tensor.type, n_per_row) - rows
            noise += shares[i_mat] * float((np.square(error) @ weights).sum())
            signal += shares[i_mat] * float((np.square(rows) @ weights).sum())
        return noise / signal if signal else 0.0

    def _restore(self, tensor: TensorInfo) -> None:
        for _, offset, raw in _pieces(tensor, 1):
            tensor_library().write(self._addresses[tensor.name], offset, raw)


class _Finder:
    """The callback that finds where the weights are, while the text is read for the first time."""

    def __init__(self, wanted: frozenset[str]) -> None:
        self.addresses: dict[str, int] = {}
        self._wanted = wanted
        self._ops = tensor_library().ops(*_OPS)
        self.callback = load_llama().ggml_backend_sched_eval_callback(self._call)

    def _call(self, pointer: int, _ask: bool, _data: object) -> bool:
        tensor = ctypes.cast(pointer, ctypes.POINTER(Tensor)).contents
        if tensor.op in self._ops:
            weight = tensor.src[0].contents
            name = weight.name.decode("utf-8", "replace")
            # A copy on another device (`CUDA0#NAME#0`) is made anew each time.
            if name in self._wanted and plain_name(weight.name) == name:
                self.addresses[name] = ctypes.addressof(weight)
        return False


def _quantizable(model: LoadedModel) -> frozenset[str]:
    """The names of the tensors that a recipe chooses a type for.

    Raises:
        UsageError: If one of them is of a type that cannot be written back.
    """
    names = frozenset(s.name for s in expected_tensors(model.arch).values() if s.quantizable)
    for name in names:
        type_ = model.gguf.tensors[name].type
        if type_ not in _WRITABLE:
            labels = " ".join(t.label for t in _WRITABLE)
            raise UsageError(
                f"{model.path}: tensor {name!r} is {type_.label}: sensitivity is measured on a file"
                f" of {labels}",
                tries=["nanorun convert SOURCE --recipe q8_0"],
            )
    return names


def _spread(chunks: list[list[int]], n: int) -> list[list[int]]:
    """`n` of the chunks, from all over the text."""
    n = min(n, len(chunks))
    return [chunks[i * len(chunks) // n] for i in range(n)]


def _pieces(tensor: TensorInfo, n_mat: int) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    """Runs of rows of each matrix: its number, the place in the tensor's bytes, the bytes."""
    raw = np.memmap(tensor.path, np.uint8, "r", tensor.offset, (tensor.n_bytes,))
    row_bytes = tensor.type.row_bytes(tensor.shape[-1])
    mat_bytes = tensor.n_bytes // n_mat
    step = max(1, _PIECE_ELEMENTS // tensor.shape[-1]) * row_bytes
    for i_mat in range(n_mat):
        for start in range(i_mat * mat_bytes, (i_mat + 1) * mat_bytes, step):
            yield i_mat, start, raw[start : min(start + step, (i_mat + 1) * mat_bytes)]


def _rounded(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows in blocks, each of `_N_LEVELS` from its largest magnitude to minus that."""
    n_per_block = _BLOCK if rows.shape[1] % _BLOCK == 0 else rows.shape[1]
    blocks = rows.reshape(-1, n_per_block)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    step = np.where(largest > 0, 2 * largest / (_N_LEVELS - 1), 1)
    # An even number of levels stand half a step beside 0; zeros stay.
    rounded = (np.rint(blocks / step - 0.5) + 0.5) * step
    return np.where(largest > 0, rounded, 0).astype(np.float32).reshape(rows.shape)
