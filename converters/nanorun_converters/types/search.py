"""The best types for a size: what each type costs each tensor, and the cheapest assignment.

The cost of a type is the noise it adds to its product's output, relative to the output itself,
under the imatrix: that of a sample of rows, experts counted by how often they are chosen, with
error feedback where the conversion will have it. How much
that noise matters depends on where the tensor stands (`importance`), and is known better where it
was measured (`nanorun imatrix --sensitivity`). Types are then chosen by `nanorun_quant.search`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nanorun.errors import UsageError
from nanorun.model.arch import HybridArch
from nanorun.model.footprint import tensor_bytes
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import Role, expected_tensors
from nanorun.model.units import format_gib
from nanorun_converters.tensors.padding import pad_tensors
from nanorun_converters.tensors.tensor_plan import OutputTensor, Piece, TensorPlan
from nanorun_converters.types.importance import importance, with_measured
from nanorun_quant.encode import Encoder, powers
from nanorun_quant.feedback import Feedback, Feedbacks
from nanorun_quant.fit import Fit, count_params
from nanorun_quant.ggml import UnquantizableError
from nanorun_quant.imatrix import Imatrix
from nanorun_quant.padding import Padding, pad_arch, paddings
from nanorun_quant.recipe import KEPT_F32, Again, Assignment, Recipe
from nanorun_quant.search import Candidate, Item, allocate
from nanorun_quant.writable_types import NEED_IMATRIX

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEARCHED = (
    GgmlType.F16, GgmlType.Q8_0, GgmlType.Q6_K, GgmlType.Q5_1, GgmlType.Q5_K, GgmlType.Q5_0,
    GgmlType.Q4_K, GgmlType.Q4_0, GgmlType.IQ4_NL, GgmlType.IQ4_XS, GgmlType.MXFP4,
    GgmlType.IQ3_S, GgmlType.Q3_K, GgmlType.IQ3_XXS, GgmlType.Q2_K, GgmlType.IQ2_S, GgmlType.Q2_0,
    GgmlType.IQ2_XXS,
)  # fmt: skip
"""Types the search chooses from; a role's floor leaves out those below it."""

_INPUT_NOISE = 5e-5
"""Noise against signal, as powers, that the engine adds to the inputs of a quantized matrix when it
rounds them to 8 bits in blocks of 32: `peak² / (12 · 127²)`, with squared peaks of 4.4 (normal
inputs) to 13 (squared ReLU) times the mean. It only matters against F16, whose inputs stay whole.
"""
N_SAMPLED = 2**18
"""Elements of a tensor that are encoded to see what a type costs it."""
N_RUNS = 8
"""Runs of rows they come from: rows of `ssm_in` are of five kinds, one after the other."""


@dataclass(frozen=True, slots=True)
class Target:
    """How large the tensors may be together."""

    n_bytes: int
    name: str
    """What the recipe is called in the file: `search-14.6GB`."""
    header_bytes: int = 0
    """What the file takes beside its tensors."""


@dataclass(frozen=True, slots=True)
class AllocateProgress:
    """How far the measuring is."""

    tensor: str
    n_done: int
    n_total: int


def search_types(
    tensors: Sequence[TensorPlan],
    arch: HybridArch,
    target: Target,
    pad: str,
    imatrix: Imatrix | None,
    encoder: Encoder,
    feedbacks: Feedbacks | None = None,
    progress: Callable[[AllocateProgress], None] | None = None,
    *,
    again: Again,
) -> Fit:
    """The padding and the types of least error within the target.

    Raises:
        UsageError: If even the smallest types do not fit; it suggests what `again` makes of the
            size that they do fit in.
    """
    measure = Measure(encoder, imatrix, feedbacks)
    measured = imatrix.sensitivity if imatrix else {}
    factors = with_measured(importance(arch, measure.powers(tensors)), measured)
    best: tuple[float, Fit] | None = None
    smallest = 0
    for padding in paddings(arch, pad):
        padded = pad_arch(arch, padding)
        items = []
        grown = [t for t in pad_tensors(tensors, arch, padded, again=again) if t.spec.quantizable]
        for i, tensor in enumerate(grown):
            if progress is not None:
                progress(AllocateProgress(tensor.spec.name, i, len(grown)))
            candidates = measure.candidates(tensor, factors[tensor.spec.name])
            items.append(Item(tensor.spec.name, tuple(candidates)))
        fixed = _unquantized_bytes(padded)
        least = fixed + sum(min(c.n_bytes for c in item.candidates) for item in items)
        smallest = min(smallest or least, least)
        chosen = allocate(items, target.n_bytes - fixed)
        if chosen is None:
            continue
        error = sum(candidate.error for candidate in chosen)
        if best is None or error < best[0]:
            names = [item.name for item in items]
            best = error, _fit(target, arch, padded, padding, dict(zip(names, chosen, strict=True)))
    if best is None:
        raise _too_small(target, smallest, again)
    return best[1]


def _too_small(target: Target, smallest: int, again: Again) -> UsageError:
    # As many MiB as hold the whole file, so that the suggestion is met.
    n_bytes = -(-(smallest + target.header_bytes) // 2**20) * 2**20
    wanted = target.n_bytes + target.header_bytes
    return UsageError(
        f"no types make this model as small as {format_gib(wanted)}",
        facts=[f"the smallest is {format_gib(smallest + target.header_bytes)}"],
        tries=[again(target_bytes=n_bytes, target_bpw=None)],
    )


def _unquantized_bytes(arch: HybridArch) -> int:
    specs = expected_tensors(arch).values()
    return sum(tensor_bytes(spec, GgmlType.F32) for spec in specs if not spec.quantizable)


def _fit(
    target: Target,
    arch: HybridArch,
    padded: HybridArch,
    padding: Padding,
    chosen: dict[str, Candidate],
) -> Fit:
    assignments = dict.fromkeys(expected_tensors(padded), KEPT_F32)
    for name, candidate in chosen.items():
        assignments[name] = Assignment(candidate.type, "least error for its size")
    recipe = Recipe(target.name, 1, GgmlType.Q8_0, summary="searched")
    table = [f"{name}={c.type.label}:{c.error:.3e}" for name, c in chosen.items()]
    return Fit(recipe, padded, padding, assignments, count_params(arch), table)


class Measure:
    """Encodes samples of tensors, and remembers what came of it."""

    def __init__(
        self, encoder: Encoder, imatrix: Imatrix | None, feedbacks: Feedbacks | None = None
    ) -> None:
        self._encoder = encoder
        self._imatrix = imatrix
        self._feedbacks = feedbacks
        self._known: dict[tuple[str, GgmlType, int], float] = {}
        self._last: tuple[tuple[str, int], list[_Sample]] | None = None

    def powers(self, tensors: Sequence[TensorPlan]) -> dict[str, float]:
        """Mean power of each tensor's output."""
        return {t.spec.name: self._power(t) for t in tensors if t.spec.quantizable}

    def candidates(self, tensor: TensorPlan, factor: float) -> Iterator[Candidate]:
        """The types a tensor may have, with what each costs."""
        spec = tensor.spec
        needs_imatrix = self._imatrix is None and spec.name.startswith("blk.")
        for type_ in SEARCHED:
            fits = spec.n_per_row % type_.block_size == 0 and spec.allows(type_)
            if not fits or (needs_imatrix and type_ in NEED_IMATRIX):
                continue
            try:
                noise = self.relative_error(tensor, type_)
            except UnquantizableError:
                continue
            if type_.is_quantized and spec.role is not Role.EMBEDDING:
                noise += _INPUT_NOISE
            yield Candidate(type_, tensor_bytes(spec, type_), factor * noise)

    def relative_error(self, tensor: TensorPlan, type_: GgmlType) -> float:
        """Power of the noise that a type adds to the output, against the output."""
        key = (tensor.spec.name, type_, tensor.spec.n_per_row)
        if key not in self._known:
            samples = self._samples_of(tensor)
            noise = sum(
                float(s.shares @ self._encoder.noise(s.rows, type_, s.weights, s.feedback))
                for s in samples
            )
            signal = self._power(tensor)
            self._known[key] = noise / signal if signal else 0.0
        return self._known[key]

    def _power(self, tensor: TensorPlan) -> float:
        samples = self._samples_of(tensor)
        return sum(float(s.shares @ powers(s.rows, s.weights, s.feedback)) for s in samples)

    def _samples_of(self, tensor: TensorPlan) -> list[_Sample]:
        # Only the last tensor's: all types are asked for one tensor before the next.
        key = (tensor.spec.name, tensor.spec.n_per_row)
        if self._last is None or self._last[0] != key:
            samples = list(_samples(tensor, self._imatrix))
            feedback = self._feedbacks.of(*key) if self._feedbacks else None
            self._last = key, [_joined(samples, feedback)] if feedback else samples
        return self._last[1]


@dataclass(frozen=True, slots=True)
class _Sample:
    rows: NDArray[np.float32]
    weights: NDArray[np.float32]
    """Mean square of each column's input."""
    shares: NDArray[np.float64]
    """For each row: of the inputs, how many go to its matrix (an expert's), times the rows it is
    for."""
    feedback: Feedback | None = None


def _samples(tensor: TensorPlan, imatrix: Imatrix | None) -> Iterator[_Sample]:
    """Runs of rows, spread evenly over each matrix."""
    spec = tensor.spec
    n_parts = len(tensor.parts)
    shares = imatrix.shares(spec.name, n_parts) if imatrix else [1 / n_parts] * n_parts
    for i, (part, share) in enumerate(zip(tensor.parts, shares, strict=True)):
        weights = imatrix.weights(spec.name, i, spec.n_per_row) if imatrix else None
        if weights is None:
            weights = np.ones(spec.n_per_row, np.float32)
        n_rows = part.n_elements // tensor.n_per_row
        n_taken = max(1, min(n_rows, N_SAMPLED // spec.n_per_row // n_parts))
        n_runs = min(N_RUNS, n_taken)
        for run in range(n_runs):
            first, end = run * n_rows // n_runs, (run + 1) * n_rows // n_runs
            n = min(n_taken // n_runs, end - first)
            piece = Piece(tensor, part, first * tensor.n_per_row, (first + n) * tensor.n_per_row, i)
            # Zero rows at the end of a part would only be encoded for nothing.
            yield _Sample(piece.read()[:n], weights, np.full(n, share * (end - first) / n))


def _joined(samples: Sequence[_Sample], feedback: Feedback) -> _Sample:
    """All rows at once, since error feedback goes through them block by block."""
    return _Sample(
        np.concatenate([s.rows for s in samples]),
        np.mean([s.weights for s in samples], axis=0, dtype=np.float32),
        np.concatenate([s.shares for s in samples]),
        feedback,
    )


@dataclass(frozen=True, slots=True)
class RoleStats:
    """What one role's type costs it."""

    role: Role
    type: GgmlType
    n_bytes: int
    rel_rmse: float
    """Noise in the output of its products against the output, both root mean squares."""


def role_stats(
    tensors: Sequence[OutputTensor],
    imatrix: Imatrix | None,
    encoder: Encoder,
    feedbacks: Feedbacks | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[RoleStats]:
    """What each role loses, most bytes first; a role of several types has the first one's name."""
    measure = Measure(encoder, imatrix, feedbacks)
    by_role: dict[Role, list[tuple[OutputTensor, float]]] = {}
    for tensor in tensors:
        if tensor.spec.quantizable:
            if progress is not None:
                progress(tensor.spec.name)
            error = measure.relative_error(tensor, tensor.type)
            by_role.setdefault(tensor.spec.role, []).append((tensor, error))
    stats = [
        RoleStats(
            role, found[0][0].type, sum(tensor.n_bytes for tensor, _ in found),
            float(np.sqrt(np.mean([error for _, error in found]))),
        )
        for role, found in by_role.items()
    ]  # fmt: skip
    return sorted(stats, key=lambda s: -s.n_bytes)
