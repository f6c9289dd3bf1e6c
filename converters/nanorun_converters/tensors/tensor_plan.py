"""One tensor of the GGUF: where its numbers come from, what is done to them, what type they get.

`TensorPlan` is what is known before types are chosen, `OutputTensor` all that is ever decided about
a tensor. Both are read in pieces of whole rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from nanorun.model.footprint import tensor_bytes
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import TensorSpec
from nanorun_converters.source.encodings import Nvfp4Tensor, Part
from nanorun_quant.recipe import Assignment

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOVED = "nvfp4 as in the source, bit for bit"


@dataclass(frozen=True, slots=True)
class PadFrame:
    """How the rows of one part are padded."""

    n_per_row: int
    """Length of a source row."""
    n_columns: int
    """Zeros after each row."""
    n_rows: int
    """Zero rows after the last."""
    factor: float
    """What every element is multiplied by."""

    @property
    def changes_anything(self) -> bool:
        """Whether the padded tensor differs from its source at all."""
        return bool(self.n_columns or self.n_rows) or self.factor != 1.0

    def apply(self, rows: NDArray[np.float32], *, is_last: bool) -> NDArray[np.float32]:
        """Pad rows of a part.

        Args:
            rows: Shape `(n, n_per_row)`.
            is_last: Whether they end their part.

        Returns:
            Shape `(n, n_per_row + n_columns)`, with `n_rows` more rows at the end of a part.
        """
        if self.factor != 1.0:
            # In float64, so that one rounding is all that happens.
            rows = (rows.astype(np.float64) * self.factor).astype(np.float32)
        return np.pad(rows, ((0, self.n_rows if is_last else 0), (0, self.n_columns)))


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of the GGUF and where its numbers come from."""

    spec: TensorSpec
    parts: tuple[Part, ...]
    """Their elements, one part after the other, are the tensor's."""
    transform: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None
    """Applied to every element alike; None to take them as they are."""
    frame: PadFrame | None = None
    """The zeros around each part, where the tensor is larger than its source."""

    @property
    def n_per_row(self) -> int:
        """Elements of a row of the source."""
        return self.frame.n_per_row if self.frame else self.spec.n_per_row

    def written_as(self, assignment: Assignment) -> OutputTensor:
        """The tensor in the type that was chosen for it.

        NVFP4 that stays NVFP4 is moved block by block, unless padding changes its rows.
        """
        is_nvfp4 = self.frame is None and all(isinstance(p, Nvfp4Tensor) for p in self.parts)
        keeps_blocks = is_nvfp4 and assignment.type is GgmlType.NVFP4
        return OutputTensor(
            self.spec, self.parts, self.transform, self.frame,
            type=assignment.type,
            reason=MOVED if keeps_blocks else assignment.reason,
            keeps_blocks=keeps_blocks,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTensor(TensorPlan):
    """One tensor of the GGUF as it will be written."""

    type: GgmlType
    reason: str
    """Why this type, in a few words."""
    keeps_blocks: bool = False
    """Whether the source's NVFP4 blocks are moved instead of made anew."""

    @property
    def n_bytes(self) -> int:
        """Bytes of its data in the file."""
        return tensor_bytes(self.spec, self.type)


def count_params(tensors: Iterable[TensorPlan]) -> int:
    """Numbers in all tensors together, without the zeros of padding."""
    return sum(part.n_elements for tensor in tensors for part in tensor.parts)


T = TypeVar("T", bound=TensorPlan)


@dataclass(frozen=True, slots=True)
class Piece(Generic[T]):
    """Whole rows of one part: what is read, quantized and written in one step."""

    tensor: T
    part: Part
    first: int
    """Element of the part."""
    end: int
    i_part: int = 0
    """Which of the tensor's parts it is of: for experts, whose."""

    @property
    def n_rows(self) -> int:
        """Rows of the GGUF that it makes."""
        n_rows = (self.end - self.first) // self.tensor.n_per_row
        frame = self.tensor.frame
        return n_rows + (frame.n_rows if frame and self.end == self.part.n_elements else 0)

    def read(self) -> NDArray[np.float32]:
        """The rows as the engine wants them: shape `(n_rows, spec.n_per_row)`, padding included."""
        data = self.part.read(self.first, self.end)
        if self.tensor.transform is not None:
            data = self.tensor.transform(data)
        rows = data.reshape(-1, self.tensor.n_per_row)
        frame = self.tensor.frame
        return frame.apply(rows, is_last=self.end == self.part.n_elements) if frame else rows

    def read_blocks(self) -> NDArray[np.uint8]:
        """The rows of a tensor that `keeps_blocks`, as ggml has them: `(n_rows, row_bytes)`."""
        if not isinstance(self.part, Nvfp4Tensor):
            raise ValueError(f"{self.part.name} holds no NVFP4")
        return self.part.read_blocks(self.first, self.end)


def pieces_of(tensor: T, max_elements: int) -> Iterator[Piece[T]]:
    """Cut a tensor into pieces of at most `max_elements`, or one row where that is longer."""
    n_per_row = tensor.n_per_row
    step = max(1, max_elements // n_per_row) * n_per_row
    for i_part, part in enumerate(tensor.parts):
        for first in range(0, part.n_elements, step):
            yield Piece(tensor, part, first, min(first + step, part.n_elements), i_part)
