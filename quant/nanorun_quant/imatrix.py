"""The importance matrix: how large the inputs of each weight matrix are, column by column.

The error of a weight is multiplied by its input, so what a quantizer should keep small is the
squared error weighted by the mean of the squared input. It may also know how a matrix's inputs go
together (Gram matrices), for `nanorun_quant.feedback`. Files: `nanorun_quant.imatrix_file`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nanorun.errors import ModelError
from nanorun.model.ggml_type import QK_K

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SAME_INPUT = {
    "attn_k": "attn_q", "attn_v": "attn_q", "ffn_up_exps": "ffn_up_shexp",
    "ffn_latent_down": "ffn_up_shexp",
}  # fmt: skip
"""Tensors of a layer that read what another one reads."""
_OWN_INPUT = frozenset(
    ("attn_q", "attn_output", "ssm_in", "ssm_out", "ffn_up", "ffn_down", "ffn_up_shexp",
     "ffn_down_shexp", "ffn_latent_up")
)  # fmt: skip


def gram_name(name: str, *, is_latent: bool) -> str | None:
    """The tensor whose Gram matrix is that of a tensor's inputs.

    Experts share one, of all that their layer reads; what goes down from each expert is its own,
    and the matrices of all experts would take more room than the model: there is none.

    Args:
        name: The tensor.
        is_latent: Whether the experts read a latent, not what the shared expert reads.
    """
    if name in ("output.weight", "token_embd.weight"):
        return name
    block, _, role = name.removesuffix(".weight").rpartition(".")
    if role == "ffn_up_exps" and is_latent:
        return name
    role = _SAME_INPUT.get(role, role)
    return f"{block}.{role}.weight" if role in _OWN_INPUT else None


@dataclass(slots=True)
class Entry:
    """The inputs of one tensor, added up."""

    sums: NDArray[np.float32]
    """Squares, `(n_mat, n_per_row)`; a matrix is an expert, or the only one."""
    counts: NDArray[np.int64]
    """Inputs seen, `(n_mat,)`."""


@dataclass(slots=True)
class Imatrix:
    """An importance matrix and the text it is from."""

    entries: dict[str, Entry] = field(default_factory=dict)
    """By the tensor's name."""
    datasets: tuple[str, ...] = ()
    chunk_size: int = 512
    n_chunks: int = 0
    name: str = "imatrix"
    """What to call it in errors: the file."""
    text_sha256: str = ""
    """Of the text, in hex, where nanorun collected it: an unfinished run is continued by it."""
    sensitivity: dict[str, float] = field(default_factory=dict)
    """KL divergence of the model's predictions for noise in a tensor's output, as a share of that
    output's power; by the tensor's name, where it was measured."""
    grams: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Sums of `x xᵀ` over a tensor's inputs `x`, `(n_per_row, n_per_row)`, by `gram_name`."""

    def add(self, name: str, i_mat: int, n_mat: int, inputs: NDArray[np.float32]) -> None:
        """Count `inputs`, `(n, n_per_row)`, of matrix `i_mat` of a tensor."""
        if name not in self.entries:
            shape = (n_mat, inputs.shape[1])
            self.entries[name] = Entry(np.zeros(shape, np.float32), np.zeros(n_mat, np.int64))
        entry = self.entries[name]
        # Summed in float64 over the batch: a long run adds small squares to a large sum.
        entry.sums[i_mat] += np.einsum("ij,ij->j", inputs, inputs, dtype=np.float64)
        entry.counts[i_mat] += len(inputs)

    def add_gram(self, name: str, inputs: NDArray[np.float32]) -> None:
        """Count `inputs`, `(n, n_per_row)`, in the Gram matrix of a tensor."""
        products = inputs.T @ inputs
        gram = self.grams.get(name)
        if gram is None:
            self.grams[name] = products
        elif gram.flags.writeable:
            gram += products
        else:  # as it was read
            self.grams[name] = gram + products

    def merge(self, other: Imatrix) -> None:
        """Add what another one has seen of the same model."""
        for name, entry in other.entries.items():
            mine = self.entries.get(name)
            if mine is None:
                self.entries[name] = entry
            else:
                mine.sums += entry.sums
                mine.counts += entry.counts

    def shares(self, name: str, n_mat: int) -> list[float]:
        """The share of a tensor's inputs that each of its matrices got; equal where not known."""
        entry = self.entries.get(name)
        if entry is None or len(entry.counts) != n_mat or not entry.counts.sum():
            return [1 / n_mat] * n_mat
        return [float(share) for share in entry.counts / entry.counts.sum()]

    def weights(self, name: str, i_mat: int, n_per_row: int) -> NDArray[np.float32] | None:
        """The mean square of each input of a matrix, `(n_per_row,)`; None if it was never seen.

        A matrix that got no input (an expert that no token chose) has weights of 1. Columns that
        padding added, here or where the imatrix was made, get a weight too small to matter.

        Raises:
            ModelError: If the entry is of a tensor of another width.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        n_mat, n_columns = entry.sums.shape
        if not _same_width(n_columns, n_per_row) or i_mat >= n_mat:
            raise ModelError(
                f"{self.name}: {name}: expected {n_per_row} columns, found {n_columns}",
                facts=["the imatrix is of another model"],
            )
        count = entry.counts[min(i_mat, len(entry.counts) - 1)]
        if count == 0:
            return np.ones(n_per_row, np.float32)
        means = np.zeros(n_per_row, np.float64)
        n = min(n_columns, n_per_row)
        means[:n] = entry.sums[i_mat, :n] / float(count)
        # Some encoders divide by the weights of a block.
        floor = 1e-6 * float(means.mean())
        return np.maximum(means, floor).astype(np.float32) if floor else np.ones(n_per_row, "f4")

    def gram(self, name: str, n_per_row: int) -> NDArray[np.float32]:
        """The mean of `x xᵀ` over a tensor's inputs, `(n, n)` for its width before padding.

        Raises:
            ModelError: If it is damaged, or of another width.
        """
        gram, entry = self.grams[name], self.entries.get(name)
        if entry is None or not _same_width(len(gram), n_per_row):
            raise ModelError(
                f"{self.name}: the Gram matrix of {name}: expected {n_per_row} columns, found"
                f" {len(gram)}",
                facts=["the imatrix is of another model"],
            )
        mean = gram / np.float32(max(1, entry.counts.sum()))
        if not np.isfinite(mean).all():
            raise ModelError(f"{self.name}: the Gram matrix of {name}: expected finite numbers")
        return mean


def _same_width(a: int, b: int) -> bool:
    """Whether two widths are of the same tensor, one of them possibly padded."""
    return a == b or -(-min(a, b) // QK_K) * QK_K == max(a, b)


def per_expert(imatrix: Imatrix, n_experts: Mapping[str, int]) -> Imatrix:
    """An imatrix read from a `.dat`, whose experts stand in one row, with a row for each."""
    for name, n in n_experts.items():
        entry = imatrix.entries.get(name)
        if entry is not None and entry.sums.shape[0] == 1 < n and entry.sums.size % n == 0:
            counts = np.repeat(entry.counts, n)
            imatrix.entries[name] = Entry(entry.sums.reshape(n, -1), counts)
    return imatrix
