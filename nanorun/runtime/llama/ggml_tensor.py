"""A running graph's tensors, as ggml's scheduler shows them to a callback."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from nanorun.errors import EngineError
from nanorun_quant.ggml import load_ggml

_TENSOR_BYTES = 336
_N_OPS = 64
"""More than enough to find the products and lookups, which stand early in `enum ggml_op`."""


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h."""


Tensor._fields_ = (
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
)


def plain_name(raw: bytes) -> str:
    """The weight's name, without the device that a copy of it is marked by: `CUDA0#NAME#0`."""
    name = raw.decode("utf-8", "replace")
    return name.split("#")[1] if "#" in name else name


class TensorLibrary:
    """The few functions of ggml that read and write a tensor, wherever its data is."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib
        lib.ggml_op_name.argtypes, lib.ggml_op_name.restype = (ctypes.c_int,), ctypes.c_char_p
        lib.ggml_nbytes.argtypes, lib.ggml_nbytes.restype = (ctypes.c_void_p,), ctypes.c_size_t
        for function in (lib.ggml_backend_tensor_get, lib.ggml_backend_tensor_set):
            pointer, size = ctypes.c_void_p, ctypes.c_size_t
            function.argtypes, function.restype = (pointer, pointer, size, size), None

    def ops(self, *names: bytes) -> dict[int, bytes]:
        """The operations called `names`, by their codes in this build."""
        found = {code: bytes(self._lib.ggml_op_name(code)) for code in range(_N_OPS)}
        return {code: name for code, name in found.items() if name in names}

    def read(self, tensor: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
        """The elements of a tensor as `(ne[2], ne[1], ne[0])`, with one more axis in front."""
        pointer, t = ctypes.cast(tensor, ctypes.c_void_p), tensor.contents
        n_bytes = self._lib.ggml_nbytes(pointer)
        buffer = np.empty(n_bytes, np.uint8)
        self._lib.ggml_backend_tensor_get(pointer, buffer.ctypes.data, 0, n_bytes)
        return as_strided(
            buffer[: n_bytes // dtype.itemsize * dtype.itemsize].view(dtype),
            tuple(t.ne)[::-1],
            tuple(t.nb)[::-1],
            writeable=False,
        )

    def write(self, address: int, offset: int, data: NDArray[np.uint8]) -> None:
        """Replace bytes of the tensor at `address`, from `offset` on."""
        data = np.ascontiguousarray(data)
        self._lib.ggml_backend_tensor_set(address, data.ctypes.data, offset, data.nbytes)


@cache
def tensor_library() -> TensorLibrary:
    """The functions, of the library that the engine uses."""
    if ctypes.sizeof(Tensor) != _TENSOR_BYTES:
        found = ctypes.sizeof(Tensor)
        raise EngineError(f"struct ggml_tensor is {found} bytes here, not {_TENSOR_BYTES}")
    return TensorLibrary(load_ggml().library)
