"""A source model into a GGUF file, in one pass and bounded memory.

Each tensor is cut into pieces of whole rows. Worker threads read, decode and quantize pieces; this
thread hands them out and writes them in file order, a few ahead at most, so memory depends neither
on the model's size nor on its number of layers.
"""

from __future__ import annotations

import hashlib
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanorun import __version__
from nanorun.errors import ModelError, NanorunError, UsageError
from nanorun.model.units import format_gib
from nanorun_converters.conversion_plan import ConversionPlan, plan_conversion
from nanorun_converters.options import ConvertOptions
from nanorun_converters.output.files import OutputFiles, part_of
from nanorun_converters.output.gguf_header import Layout, split_paths
from nanorun_converters.output.pipeline import Hashing, Workers, n_cores
from nanorun_converters.source.encodings import Nvfp4Tensor
from nanorun_converters.source.files import Files
from nanorun_converters.tensors.tensor_plan import OutputTensor, Piece, pieces_of
from nanorun_quant.encode import Encoder
from nanorun_quant.feedback import Feedback
from nanorun_quant.ggml import UnquantizableError
from nanorun_quant.writable_types import NEED_IMATRIX, USE_NO_IMATRIX

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

__all__ = ["ConvertOptions", "ConvertProgress", "ConvertResult", "convert"]

PIECE_ELEMENTS = 2**20
"""4 MiB as float32: a fifth of a second of the slowest quantizer, so a stop is quick."""


@dataclass(frozen=True, slots=True)
class ConvertProgress:
    """How far a conversion is; sent after every piece."""

    tensor: str
    """The tensor being written."""
    n_bytes_done: int
    n_bytes: int
    """Of the output's tensor data."""


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What a conversion made; the fields are the keys of `nanorun convert --json`."""

    path: str
    bytes: int
    """Size of the file."""
    n_tensors: int
    n_params: int
    bpw: float
    recipe: str
    types: dict[str, int]
    """Tensors of each type."""
    padding: dict[str, tuple[int, int]]
    """Size that was padded: from, to."""
    seconds: float
    peak_rss_bytes: int
    """Most memory this process ever had resident."""
    resumed: bool
    notes: tuple[str, ...]
    """What was passed over or decided about the source."""


def convert(
    source: Path | Files,
    options: ConvertOptions,
    progress: Callable[[ConvertProgress], None] | None = None,
) -> ConvertResult:
    """Convert the source model in the folder, or of the files, `source`.

    Raises:
        UsageError: If the options cannot be meant, or the output exists.
        ModelError: If the source model is damaged or not supported.
        NanorunError: If the output cannot be written.
    """
    started = time.monotonic()
    plan = plan_conversion(source, options)
    if options.dry_run:
        return summarize(plan, plan.lay_out(), started)
    return write_plan(plan, options, progress, started)


def write_plan(
    plan: ConversionPlan,
    options: ConvertOptions,
    progress: Callable[[ConvertProgress], None] | None = None,
    started: float | None = None,
) -> ConvertResult:
    """Carry out a conversion; raises as `convert` does."""
    started = time.monotonic() if started is None else started
    layouts = plan.lay_out()
    paths = split_paths(plan.out, len(layouts))
    _check_output(plan, paths, layouts, options)
    with OutputFiles(paths, layouts, _fingerprint(plan, layouts)) as output:
        if output.journal.is_of_another:
            log.warning(
                "%s: the source or the recipe is another than it was: starting anew",
                output.parts[0],
            )
        _write_all(plan, output, _n_workers(plan, options), progress)
    return summarize(plan, layouts, started, resumed=output.resumed)


def summarize(
    plan: ConversionPlan, layouts: Sequence[Layout], started: float, *, resumed: bool = False
) -> ConvertResult:
    """The result of a plan, carried out or not."""
    return ConvertResult(
        path=str(split_paths(plan.out, len(layouts))[0]),
        bytes=sum(layout.file_bytes for layout in layouts),
        n_tensors=len(plan.tensors),
        n_params=plan.n_params,
        bpw=round(plan.bpw, 4),
        recipe=plan.recipe,
        types=plan.type_counts(),
        padding=plan.padding,
        seconds=round(time.monotonic() - started, 3),
        peak_rss_bytes=_peak_rss_bytes(),
        resumed=resumed,
        notes=plan.notes,
    )


def _n_workers(plan: ConversionPlan, options: ConvertOptions) -> int:
    n_threads = options.n_threads or n_cores()
    # Reads from afar wait most of the time; more of them at once keep the cores busy.
    return n_threads + plan.source.files.n_reads_ahead


def _check_output(
    plan: ConversionPlan,
    paths: Sequence[Path],
    layouts: Sequence[Layout],
    options: ConvertOptions,
) -> None:
    out = paths[0]
    if not out.parent.is_dir():
        raise UsageError(
            f"there is no folder {out.parent} to write {out.name} to",
            tries=[f"mkdir -p {shlex.quote(str(out.parent))}"],
        )
    parts = [part_of(path) for path in paths]
    there = [path for path in paths if path.exists()]
    # The first file gets its name last: until then, those that have theirs are of a run that was
    # killed in between.
    is_cut_short = out not in there and parts[0].is_file()
    if there and not is_cut_short and not options.force:
        command = options.command(plan.source.files.argument, out=plan.out, force=True)
        raise UsageError(f"{there[0]} exists already", tries=[command])
    # What an earlier run has written already takes no more room.
    written = sum(part.stat().st_size for part in parts if part.is_file())
    free = shutil.disk_usage(out.parent).free
    n_bytes = sum(layout.file_bytes for layout in layouts)
    if free + written < n_bytes:
        raise NanorunError(
            f"{out} takes {format_gib(n_bytes)}, but the disk has {format_gib(free)} free"
        )


def _fingerprint(plan: ConversionPlan, layouts: Sequence[Layout]) -> str:
    """A hash that changes with anything that the output's bytes depend on."""
    digest = hashlib.sha256()
    quantizer = metadata.version("llama-cpp-python")
    digest.update(f"{__version__} {quantizer} {PIECE_ELEMENTS}".encode())
    for store in plan.source.stores:
        digest.update(f"\0{store.name}\0{store.n_bytes}\0{store.stamp}".encode())
    for layout in layouts:
        digest.update(layout.header)
    entries = plan.imatrix.entries if plan.imatrix else {}
    for name in sorted(entries):
        digest.update(name.encode() + entries[name].sums.tobytes() + entries[name].counts.tobytes())
    # Gigabytes, of the same inputs as the sums: which there are is all that can differ.
    digest.update("\0".join(sorted(plan.imatrix.grams if plan.imatrix else ())).encode())
    return digest.hexdigest()


def _write_all(
    plan: ConversionPlan,
    output: OutputFiles,
    n_threads: int,
    progress: Callable[[ConvertProgress], None] | None,
) -> None:
    journal = output.journal
    with (
        Hashing(plan.source.stores, journal.hashes, journal.add_hash) as hashing,
        Workers(n_threads, plan.source.files.give_up) as workers,
    ):
        _write_tensors(plan, output, workers, progress)
        output.finish([layout.header for layout in plan.lay_out(hashing.wait())])


def _write_tensors(
    plan: ConversionPlan,
    output: OutputFiles,
    workers: Workers,
    progress: Callable[[ConvertProgress], None] | None,
) -> None:
    n_bytes, n_bytes_done = plan.tensor_bytes, output.n_data_done
    encode = _PieceEncoder(plan, plan.quantizer.open())
    for piece, data in workers.map_in_order(encode, _pieces(plan, n_bytes_done)):
        output.write(data)
        n_bytes_done += data.nbytes
        if progress is not None:
            progress(ConvertProgress(piece.tensor.spec.name, n_bytes_done, n_bytes))


def _pieces(plan: ConversionPlan, n_bytes_done: int) -> Iterator[Piece[OutputTensor]]:
    """The pieces to write, after those that make the first `n_bytes_done` of the data."""
    for tensor in plan.tensors:
        if tensor.n_bytes <= n_bytes_done:
            n_bytes_done -= tensor.n_bytes
            continue
        row_bytes = tensor.type.row_bytes(tensor.spec.n_per_row)
        for piece in pieces_of(tensor, PIECE_ELEMENTS):
            if n_bytes_done > 0:
                n_bytes_done -= piece.n_rows * row_bytes
            else:
                yield piece


@dataclass(frozen=True, slots=True)
class _PieceEncoder:
    """Reads a piece and encodes it; what a worker thread does."""

    plan: ConversionPlan
    encoder: Encoder

    def __call__(self, piece: Piece[OutputTensor]) -> NDArray[np.uint8]:
        tensor = piece.tensor
        if isinstance(piece.part, Nvfp4Tensor) and piece.first == 0:
            self._tell_of_zeros(piece.part)
        try:
            if tensor.keeps_blocks:
                return piece.read_blocks()
            weights, feedback = self._weights_of(piece), self._feedback_of(tensor)
            return self.encoder.encode(piece.read(), tensor.type, weights, feedback)
        except UnquantizableError as error:
            raise ModelError(
                f"{self.plan.source.origin / piece.part.store.name}: tensor"
                f" {piece.part.name!r}: {error}",
                facts=[f"it becomes {tensor.spec.name} as {tensor.type.label}"],
            ) from error

    def _tell_of_zeros(self, part: Nvfp4Tensor) -> None:
        """Say of a matrix whose factor makes zeros of all of it, as calibration may leave one."""
        if not part.is_divisor and part.factor.read(0, 1)[0] == 0:
            name = self.plan.source.origin / part.store.name
            text = f"{name}: tensor {part.factor.name!r} is 0: all of {part.name!r} becomes 0"
            log.warning("%s", text)
            self.plan.source.tell(text)

    def _weights_of(self, piece: Piece[OutputTensor]) -> NDArray[np.float32] | None:
        """How much an error in each column matters, `(n_per_row,)`; None where all do alike."""
        type_, spec, imatrix = piece.tensor.type, piece.tensor.spec, self.plan.imatrix
        if type_ in USE_NO_IMATRIX:
            return None
        found = imatrix.weights(spec.name, piece.i_part, spec.n_per_row) if imatrix else None
        if found is None and type_ in NEED_IMATRIX:
            # Blocks that an imatrix has not seen (MTP, the embedding) are made as if all inputs
            # were alike.
            return np.ones(spec.n_per_row, np.float32)
        return found

    def _feedback_of(self, tensor: OutputTensor) -> Feedback | None:
        if self.plan.feedbacks is None or not tensor.type.is_quantized:
            return None
        return self.plan.feedbacks.of(tensor.spec.name, tensor.spec.n_per_row)


def _peak_rss_bytes() -> int:
    # Not getrusage on Linux: its figure survives exec, so it may be that of the shell before us.
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="utf-8").splitlines()
        peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
        if peaks:
            return peaks[0] * 1024
    try:
        import resource
    except ImportError:
        import psutil

        windows: Any = psutil.Process().memory_info()
        return int(windows.peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
