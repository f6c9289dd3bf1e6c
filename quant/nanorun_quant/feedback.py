"""Error feedback: what encoding one block of a row loses, the blocks after it make up for.

A matrix's inputs go together, so errors in some columns can cancel those in others. Errors `E` of
rows add `tr(E H Eᵀ)` to the output's squared error, where the Gram matrix `H` is the mean of `x xᵀ`
over inputs `x`. With `H = R Rᵀ`, `R` upper triangular, that is `‖E R‖²`, and the columns of `E R`
in a block `b` depend on the errors up to it alone. So blocks are encoded first to last, and block
`b` not from its weights `w_b` but from `w_b + (Σ E_a R_ab) R_bb⁻¹`, over the blocks `a` before it:
the numbers that would make those columns zero.

This is GPTQ (Frantar et al., arXiv 2210.17323) in the form of LDLQ (Chee et al., arXiv 2307.13304),
with a whole block as its step: any encoder of blocks can be used as it is, and the bits are as
valid as without.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from nanorun.errors import ModelError
from nanorun_quant.imatrix import Imatrix, gram_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

DAMPING = 0.01
"""Of the mean power of inputs, added to each: GPTQ's figure. It bounds what is made up for where
inputs have hardly been seen, and makes `H` definite."""
_N_KEPT = 2

EncodeBlock = Callable[
    ["NDArray[np.float32]", slice], "tuple[NDArray[np.uint8], NDArray[np.float32]]"
]
"""Blocks `(n_rows, block_size)` of these columns, as bytes and as the numbers they stand for."""


class Feedback:
    """How the inputs of a matrix go together; methods may be called from several threads.

    Args:
        gram: Mean of `x xᵀ`, `(n, n)`, finite.
        n_per_row: Columns of the matrix, more than `n` where it is padded.

    Raises:
        ValueError: If no inputs can have given such a matrix.
    """

    def __init__(self, gram: NDArray[np.float32], n_per_row: int) -> None:
        n = len(gram)
        # From the last row up: `flip(L) flip(L)ᵀ`, upper triangular, of flipped `H = L Lᵀ`.
        flipped = gram[::-1, ::-1].astype(np.float64)
        damping = DAMPING * float(np.trace(flipped)) / n or 1.0
        flipped[np.diag_indices(n)] += damping
        try:
            factor = np.linalg.cholesky(flipped)
        except np.linalg.LinAlgError as error:
            raise ValueError("expected a positive definite matrix") from error
        del flipped
        self._root = np.zeros((n_per_row, n_per_row), np.float32)
        self._root[:n, :n] = factor[::-1, ::-1]
        padding = np.arange(n, n_per_row)
        self._root[padding, padding] = np.sqrt(damping)
        self._steps: dict[int, NDArray[np.float32]] = {}
        self._lock = threading.Lock()

    def encode(
        self, rows: NDArray[np.float32], block_size: int, encode_block: EncodeBlock
    ) -> NDArray[np.uint8]:
        """Encode rows `(n_rows, n_per_row)` block by block; the bytes, `(n_rows, row_bytes)`."""
        step = self._step(block_size)
        errors = np.zeros_like(rows)
        raw = []
        for start in range(0, rows.shape[1], block_size):
            block = slice(start, start + block_size)
            wanted = rows[:, block] + errors[:, :start] @ step[:start, block]
            data, values = encode_block(wanted, block)
            errors[:, block] = rows[:, block] - values
            raw.append(data)
        return np.concatenate(raw, axis=1)

    def powers(self, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """Mean square of each row's output, `(n_rows,)`."""
        powers: NDArray[np.float64] = np.square(rows @ self._root).sum(axis=1, dtype=np.float64)
        return powers

    def _step(self, block_size: int) -> NDArray[np.float32]:
        """`R_ab R_bb⁻¹` for all blocks `a` before `b`, else zeros; `(n_per_row, n_per_row)`."""
        with self._lock:
            if block_size not in self._steps:
                step = np.zeros_like(self._root)
                for start in range(block_size, len(step), block_size):
                    block = slice(start, start + block_size)
                    inverse = np.linalg.inv(self._root[block, block].astype(np.float64))
                    step[:start, block] = self._root[:start, block] @ inverse
                self._steps[block_size] = step
            return self._steps[block_size]


class Feedbacks:
    """The `Feedback` of each tensor of a model that an imatrix has a Gram matrix for.

    Args:
        imatrix: The imatrix.
        is_latent: Whether the experts read a latent of their own.
    """

    def __init__(self, imatrix: Imatrix, *, is_latent: bool) -> None:
        self._imatrix = imatrix
        self._is_latent = is_latent
        self._kept: dict[tuple[str, int], Feedback] = {}
        self._lock = threading.Lock()

    def of(self, name: str, n_per_row: int) -> Feedback | None:
        """For a tensor's rows, padded or not; None where its inputs' Gram matrix is not known.

        Raises:
            ModelError: If the matrix is damaged or of another model.
        """
        key = gram_name(name, is_latent=self._is_latent)
        if key not in self._imatrix.grams:
            return None
        with self._lock:  # threads that need the same one wait for it
            if (key, n_per_row) not in self._kept:
                while len(self._kept) >= _N_KEPT:
                    del self._kept[next(iter(self._kept))]
                gram = self._imatrix.gram(key, n_per_row)
                try:
                    self._kept[key, n_per_row] = Feedback(gram, n_per_row)
                except ValueError as error:
                    raise ModelError(
                        f"{self._imatrix.name}: the Gram matrix of {key}: {error}"
                    ) from error
            return self._kept[key, n_per_row]
