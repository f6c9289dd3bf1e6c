"""The binding of ggml's own C quantizers, in libggml-base.

Bytes made here equal those of `llama-quantize` because it is the same code. ctypes releases the
GIL during a call, so several Python threads quantize at once. What would abort the process inside
C (a row that is not whole blocks, a missing imatrix) is refused before the call.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanorun.errors import LibraryError
from nanorun.model.ggml_type import GgmlType
from nanorun_quant.writable_types import QUANTIZERS

if TYPE_CHECKING:
    from numpy.typing import NDArray

F16_MAX = 65504.0
REINSTALL = "pip install --force-reinstall --no-cache-dir 'llama-cpp-python>=0.3.36,<0.4'"


class UnquantizableError(ValueError):
    """Numbers that a type cannot hold: NaN, infinity, or too large for f16."""


class _TypeTraits(ctypes.Structure):
    """The start of `struct ggml_type_traits` in ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


class Ggml:
    """libggml-base, opened; every method may be called from several threads."""

    def __init__(self, path: Path) -> None:
        try:
            self._lib = ctypes.CDLL(str(path))
            self._declare()
        except (OSError, AttributeError) as error:
            raise LibraryError(
                f"{path} cannot be used", facts=[str(error)], tries=[REINSTALL]
            ) from error
        for type_ in QUANTIZERS:
            self._check_block(type_, path)

    @property
    def library(self) -> ctypes.CDLL:
        """The library itself, for functions that are not about numbers."""
        return self._lib

    def quantize(
        self,
        data: NDArray[np.float32],
        type_: GgmlType,
        imatrix: NDArray[np.float32] | None = None,
    ) -> NDArray[np.uint8]:
        """Encode rows of numbers as `type_`.

        Args:
            data: `(n_rows, n_per_row)`.
            type_: One of `QUANTIZERS`.
            imatrix: Weight of each column's error, `(n_per_row,)`.

        Returns:
            The bytes, `(n_rows, row_bytes)`.

        Raises:
            UnquantizableError: If a number is not finite, or beyond what f16 holds.
            ValueError: If the type or a shape cannot be meant.
        """
        if type_ not in QUANTIZERS:
            raise ValueError(f"{type_.label} is not among the quantizers")
        if imatrix is None and self._lib.ggml_quantize_requires_imatrix(type_):
            raise ValueError(f"{type_.label} cannot be made without an imatrix")
        n_rows, n_per_row = data.shape
        row_bytes = type_.row_bytes(n_per_row)
        data = np.ascontiguousarray(data, np.float32)
        check_range(data, type_)
        weights = None
        if imatrix is not None:
            if imatrix.shape != (n_per_row,):
                raise ValueError(f"imatrix of shape {imatrix.shape} for rows of {n_per_row}")
            imatrix = np.ascontiguousarray(imatrix, np.float32)
            weights = imatrix.ctypes.data
        raw = np.empty((n_rows, row_bytes), np.uint8)
        self._lib.ggml_quantize_chunk(
            type_, data.ctypes.data, raw.ctypes.data, 0, n_rows, n_per_row, weights
        )
        self.check_blocks(raw, type_)
        return raw

    def check_blocks(self, raw: NDArray[np.uint8], type_: GgmlType) -> None:
        """Refuse blocks that the engine would refuse.

        Args:
            raw: Whole blocks, in any shape.
            type_: Their type.

        Raises:
            UnquantizableError: If a scale is not finite.
        """
        if type_.is_quantized and not self._lib.ggml_validate_row_data(
            type_, raw.ctypes.data, raw.nbytes
        ):
            raise UnquantizableError(f"a block's scale is beyond what {type_.label} holds")

    def dequantize(
        self, raw: NDArray[np.uint8], type_: GgmlType, n_per_row: int
    ) -> NDArray[np.float32]:
        """Decode rows of `type_` bytes into numbers, `(n_rows, n_per_row)`."""
        n_rows, rest = divmod(raw.size, type_.row_bytes(n_per_row))
        if rest:
            raise ValueError(f"{raw.size} bytes are no whole rows of {n_per_row} as {type_.label}")
        raw = np.ascontiguousarray(raw)
        if type_ is GgmlType.F32:
            return raw.view("<f4").reshape(n_rows, n_per_row).copy()
        data = np.empty((n_rows, n_per_row), np.float32)
        traits = self._lib.ggml_get_type_traits(type_).contents
        if not traits.to_float:
            raise ValueError(f"{type_.label} has no decoder")
        traits.to_float(raw.ctypes.data, data.ctypes.data, data.size)
        return data

    def _declare(self) -> None:
        lib, pointer, i64 = self._lib, ctypes.c_void_p, ctypes.c_int64
        lib.ggml_quantize_chunk.argtypes = (ctypes.c_int, pointer, pointer, i64, i64, i64, pointer)
        lib.ggml_quantize_chunk.restype = ctypes.c_size_t
        lib.ggml_validate_row_data.argtypes = (ctypes.c_int, pointer, ctypes.c_size_t)
        lib.ggml_validate_row_data.restype = ctypes.c_bool
        lib.ggml_quantize_requires_imatrix.argtypes = (ctypes.c_int,)
        lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        lib.ggml_get_type_traits.argtypes = (ctypes.c_int,)
        lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)

    def _check_block(self, type_: GgmlType, path: Path) -> None:
        """Refuse a build whose blocks are not ours: it would write past our buffers."""
        traits = self._lib.ggml_get_type_traits(type_).contents
        found = (traits.block_size, traits.type_size)
        if found != (type_.block_size, type_.type_size):
            raise LibraryError(
                f"{path}: {type_.label} is stored as {found[1]} bytes per {found[0]} elements,"
                f" expected {type_.type_size} per {type_.block_size}",
                tries=[REINSTALL],
            )


@cache
def load_ggml() -> Ggml:
    """Open the libggml-base that llama-cpp-python ships, once.

    Raises:
        LibraryError: If llama-cpp-python or the library in it is missing or of another layout.
    """
    folder = _library_folder()
    name = {"win32": "ggml-base.dll", "darwin": "libggml-base.dylib"}.get(
        sys.platform, "libggml-base.so"
    )
    path = folder / name
    if not path.is_file():
        raise LibraryError(f"{name} is not in {folder}", tries=[REINSTALL])
    return Ggml(path)


def _library_folder() -> Path:
    # Found without importing llama_cpp, which would load all of libllama. The variable is the one
    # that llama_cpp itself obeys, so both use the same build.
    override = os.environ.get("LLAMA_CPP_LIB_PATH")
    if override:
        return Path(override)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise LibraryError(
            "llama-cpp-python is not installed", tries=["pip install 'llama-cpp-python>=0.3.36'"]
        )
    return Path(spec.origin).parent / "lib"


def check_range(data: NDArray[np.float32], type_: GgmlType) -> None:
    """Refuse numbers that a type cannot hold.

    Args:
        data: `(n_rows, n_per_row)`.
        type_: The type.

    Raises:
        UnquantizableError: If one is not finite, or beyond what f16 holds.
    """
    if data.size == 0:
        return
    # min and max pass a NaN on and, unlike isfinite, need no array of their own.
    low, high = float(data.min()), float(data.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = np.flatnonzero(~np.isfinite(data))
        row, column = divmod(int(bad[0]), data.shape[1])
        raise UnquantizableError(
            f"{bad.size} of {data.size} elements are not finite, the first is"
            f" {data[row, column]} in row {row}, column {column}"
        )
    if type_ is GgmlType.F16 and max(-low, high) > F16_MAX:
        raise UnquantizableError(f"{max(-low, high):g} is beyond the {F16_MAX:g} that f16 holds")
