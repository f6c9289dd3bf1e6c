"""Keeps routed experts of some blocks in main memory while an accelerator holds the rest.

llama.cpp takes a list of patterns of tensor names, each with the kind of buffer for it
(`llama_model_params.tensor_buft_overrides`). llama-cpp-python does not declare its element.
"""

from __future__ import annotations

import ctypes
from typing import Any

_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"


class _Override(ctypes.Structure):
    """llama_model_tensor_buft_override of llama.h."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def keep_experts_on_host(llama: Any, params: Any, n_cpu_moe: int) -> None:
    """Have the experts of the first blocks loaded into main memory.

    Args:
        llama: The loaded bindings.
        params: The `llama_model_params` to change; they must live until the model is loaded.
        n_cpu_moe: Blocks, counted from the first; those without experts count as well.
    """
    n_cpu_moe = min(n_cpu_moe, llama.llama_max_tensor_buft_overrides() - 1)
    if n_cpu_moe <= 0:
        return
    ggml = llama._lib  # on Linux and macOS libllama resolves what its own dependencies export
    ggml.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
    buffer_type = ggml.ggml_backend_cpu_buffer_type()
    # The engine reads up to an entry without a pattern.
    overrides = (_Override * (n_cpu_moe + 1))()
    for i in range(n_cpu_moe):
        overrides[i] = _Override(rf"blk\.{i}{_EXPERTS}".encode(), buffer_type)
    params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    # The field is a bare address: what it points to lives as long as the parameters do.
    params.kept_alive = overrides
