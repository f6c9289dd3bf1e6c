"""How far models stray from a reference: Kullback-Leibler divergence of their predictions.

The method is that of `llama-perplexity --kl-divergence`. The reference is run once; its log
probabilities go to a temporary file, 16 bits each, so that memory does not grow with the text and
only one model is loaded at a time. A vocabulary of 131,072 takes 256 KiB a prediction there.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nanorun.errors import NanorunError, UsageError
from nanorun.model.engine_options import EngineOptions
from nanorun.model.gguf import read_gguf
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.measure.perplexity import Progress, Source, log_softmax, predictions
from nanorun.runtime.process.job import run_job

# What is less likely than e^-16 of the likeliest is stored as that, and left out of the sum.
_RANGE = 16.0
_N_STEPS = 65535


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far one model strays from the reference."""

    path: str
    n_tokens: int
    ppl: float
    kld_mean: float
    """Nats."""
    kld_p99: float
    """99 of 100 predictions stray less."""
    top1_agreement: float
    """Share of predictions with the reference's likeliest token."""
    bpw: float
    """Bits of the file's tensors per weight of the reference: padding's zeros are no weights."""
    bytes: int
    """Size of the file."""


def measure(
    reference: Path,
    models: Sequence[Path],
    text: str,
    n_ctx: int,
    options: EngineOptions,
    progress: Callable[[Path, int, int], None] | None = None,
    *,
    special: bool = False,
) -> list[Divergence]:
    """Compare models with a reference on a text, in a child process.

    Args:
        reference: The GGUF whose predictions count as right.
        models: Those to compare.
        text: At least four tokens.
        n_ctx: Tokens of a chunk.
        options: Threads and types.
        progress: Called with the model that runs, chunks done and chunks in all.
        special: Whether texts of control tokens become control tokens.

    Raises:
        UsageError: If the text is too short, or a model reads it as other tokens.
        ModelError: If a file cannot be used.
        EngineDied: If the engine's process ended.
    """

    def told(path: str, n_done: int, n_total: int) -> None:
        if progress is not None:
            progress(Path(path), n_done, n_total)

    arguments = {
        "reference": str(reference), "models": [str(path) for path in models], "text": text,
        "n_ctx": n_ctx, "options": asdict(options), "special": special,
    }  # fmt: skip
    return [Divergence(**found) for found in run_job(_job, arguments, told)]


def _job(
    arguments: dict[str, Any], progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    source = Source(arguments["text"], arguments["n_ctx"], special=arguments["special"])
    reference, models = Path(arguments["reference"]), map(Path, arguments["models"])
    options = EngineOptions(**arguments["options"])

    def told(path: Path) -> Progress:
        return lambda n_done, n_total: progress(str(path), n_done, n_total)

    try:
        with tempfile.TemporaryFile(prefix="nanorun-eval-") as spool:
            chunks = _spool_reference(reference, source, options, spool, told(reference))
            n_weights = read_gguf(reference).n_params
            return [
                asdict(_compare(path, source, options, spool, chunks, n_weights, told(path)))
                for path in models
            ]
    except OSError as error:
        raise NanorunError(
            f"the reference's predictions cannot be kept: {error.strerror or error}",
            facts=[f"they go to a temporary file in {tempfile.gettempdir()}"],
        ) from error


def _spool_reference(
    path: Path,
    source: Source,
    options: EngineOptions,
    spool: BinaryIO,
    progress: Progress,
) -> list[list[int]]:
    model = LoadedModel(path, options)
    try:
        chunks = source.chunks(model)
        for part in predictions(model, options, chunks, progress):
            spool.write(encoded_predictions(part.logits).tobytes())
    finally:
        model.close()
    return chunks


def _compare(
    path: Path,
    source: Source,
    options: EngineOptions,
    spool: BinaryIO,
    chunks: list[list[int]],
    n_weights: int,
    progress: Progress,
) -> Divergence:
    model = LoadedModel(path, options)
    spool.seek(0)
    klds: list[NDArray[np.float64]] = []
    loss, n_same = 0.0, 0
    try:
        if source.chunks(model) != chunks:
            raise UsageError(f"{path} reads the text as other tokens than the reference")
        dtype = _row_type(model.n_vocab)
        for part in predictions(model, options, chunks, progress):
            rows = np.frombuffer(spool.read(dtype.itemsize * len(part.targets)), dtype)
            log_q = log_softmax(part.logits)
            loss -= float(log_q[np.arange(len(rows)), part.targets].sum())
            klds.append(decoded_divergences(rows, log_q))
            n_same += int((log_q.argmax(-1) == rows["top"]).sum())
        gguf = model.gguf
        n_bits = 8 * sum(t.n_bytes for t in gguf.tensors.values())
    finally:
        model.close()
    values = np.concatenate(klds)
    return Divergence(
        path=str(path),
        n_tokens=values.size,
        ppl=math.exp(loss / values.size),
        kld_mean=float(values.mean()),
        kld_p99=float(np.quantile(values, 0.99)),
        top1_agreement=n_same / values.size,
        bpw=n_bits / n_weights,
        bytes=gguf.file_bytes,
    )


def _row_type(n_vocab: int) -> np.dtype[np.void]:
    return np.dtype(
        [("step", "<f4"), ("least", "<f4"), ("top", "<i4"), ("codes", "<u2", (n_vocab,))]
    )


def encoded_predictions(logits: NDArray[np.float32]) -> NDArray[np.void]:
    """Rows of logits as log probabilities in steps of a 65535th of their range.

    Args:
        logits: `(n_rows, n_vocab)`.

    Returns:
        Records of `_row_type(n_vocab)`, `(n_rows,)`.
    """
    rows = np.empty(len(logits), _row_type(logits.shape[1]))
    log_p = log_softmax(logits)
    most = log_p.max(-1)
    least = np.maximum(log_p.min(-1), most - _RANGE)
    rows["step"] = (most - least) / _N_STEPS
    rows["least"] = least
    rows["top"] = logits.argmax(-1)
    step = np.maximum((most - least) / _N_STEPS, np.finfo(np.float64).tiny)
    codes = np.rint((log_p - least[:, None]) / step[:, None])
    rows["codes"] = np.clip(codes, 0, _N_STEPS)
    return rows


def decoded_divergences(rows: NDArray[np.void], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL divergence of each row of `log_q` from the stored reference, in nats.

    Args:
        rows: The reference, from `encoded_predictions`, `(n_rows,)`.
        log_q: Log probabilities to compare, `(n_rows, n_vocab)`.

    Returns:
        One divergence a row, `(n_rows,)`.
    """
    step, least = rows["step"].astype(np.float64), rows["least"].astype(np.float64)
    log_p = rows["codes"] * step[:, None] + least[:, None]
    terms = np.exp(log_p) * (log_p - log_q)
    terms[log_p <= -_RANGE] = 0.0
    return np.asarray(terms.sum(-1))


def render_plot(results: Sequence[Divergence]) -> Iterator[str]:
    """An SVG of bits per weight against mean divergence, on a logarithmic axis."""
    width, height, margin = 720, 480, 64
    bits = [r.bpw for r in results]
    logs = [math.log10(max(r.kld_mean, 1e-9)) for r in results]
    x_low, x_high = math.floor(min(bits)), math.ceil(max(bits) + 1e-9)
    y_low, y_high = math.floor(min(logs)), math.ceil(max(logs) + 1e-9)
    x_high, y_high = max(x_high, x_low + 1), max(y_high, y_low + 1)

    def x(value: float) -> float:
        return margin + (value - x_low) / (x_high - x_low) * (width - 2 * margin)

    def y(value: float) -> float:
        return height - margin - (value - y_low) / (y_high - y_low) * (height - 2 * margin)

    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="12">'
    )
    yield f'<rect width="{width}" height="{height}" fill="white"/>'
    for tick in range(x_low, x_high + 1):
        yield _line(x(tick), y(y_low), x(tick), y(y_high))
        yield _label(x(tick), height - margin + 20, "middle", str(tick))
    for power in range(y_low, y_high + 1):
        yield _line(x(x_low), y(power), x(x_high), y(power))
        yield _label(margin - 8, y(power) + 4, "end", f"{10.0**power:g}")
    yield _label(width / 2, height - 16, "middle", "bits per weight")
    yield _label(margin, margin - 24, "start", "mean KL divergence from the reference (nats)")
    for result, bit, log in zip(results, bits, logs, strict=True):
        yield f'<circle cx="{x(bit):.1f}" cy="{y(log):.1f}" r="4" fill="#3366cc"/>'
        yield _label(x(bit) + 7, y(log) + 4, "start", Path(result.path).stem)
    yield "</svg>"


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="#ddd"/>'


def _label(x: float, y: float, anchor: str, text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped}</text>'
