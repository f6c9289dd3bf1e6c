"""llama.cpp's parameters for given options: the engine opens by them, and so does the probe.

The memory plan is checked against the probe, so its promise holds for the engine only as long as
both open a model alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanorun.errors import LibraryError
from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.llama.expert_placement import keep_experts_on_host

_FLASH_ATTN_ENABLED = 1
# llama.cpp puts as many layers on accelerators as there are, if more are asked for.
_MOST_LAYERS = 999


def model_params(llama: Any, options: EngineOptions) -> Any:
    """A `llama_model_params` with the weights placed as the options say."""
    params = llama.llama_model_default_params()
    params.n_gpu_layers = options.n_gpu_layers if options.n_gpu_layers >= 0 else _MOST_LAYERS
    # A context of the head asserts that it was loaded.
    params.load_mtp = options.with_mtp
    keep_experts_on_host(llama, params, options.n_cpu_moe)
    return params


def progress_hook(llama: Any, tell: Callable[[float], None]) -> Any:
    """A `llama_progress_callback` that tells each whole percent once; the load goes on.

    Assigned to a structure it stays alive as long as that does.
    """
    last = -1

    def receive(part: float, _user_data: object) -> bool:
        nonlocal last
        percent = int(100 * part)
        if percent > last:
            last = percent
            tell(min(1.0, part))
        return True

    return llama.llama_progress_callback(receive)


def context_params(
    llama: Any, options: EngineOptions, *, head: bool = False, n_outputs_max: int | None = None
) -> Any:
    """A `llama_context_params` of the sizes that the options give.

    Args:
        llama: The binding.
        options: Sizes.
        head: For the context of the model's MTP head instead of the main one.
        n_outputs_max: Rows of logits a single decode may give; llama.cpp reserves memory for each.
            None for one a sequence and one a guess.
    """
    params = llama.llama_context_default_params()
    params.n_ctx = options.n_ctx
    params.n_batch = options.n_batch
    params.n_ubatch = min(options.n_ubatch, options.n_batch)
    params.n_seq_max = options.n_seq_max
    params.n_rs_seq = 0 if head else options.n_rs_seq
    # The default of 0 reserves n_batch rows of logits.
    params.n_outputs_max = n_outputs_max or options.n_seq_max * (1 + params.n_rs_seq)
    params.n_outputs_max_per_seq = n_outputs_max or 1 + params.n_rs_seq
    if head:
        params.ctx_type = llama.LLAMA_CONTEXT_TYPE_MTP
    params.n_threads = params.n_threads_batch = options.n_threads or _physical_cores()
    # Without it the compute buffer grows with n_ctx x n_ubatch x heads: 67 GiB for Nano at 1M.
    params.flash_attn_type = _FLASH_ATTN_ENABLED
    params.type_k, params.type_v = int(options.type_k), int(options.type_v)
    params.kv_unified = True
    params.no_perf = True
    return params


def _physical_cores() -> int:
    try:
        import psutil
    except ImportError as error:
        raise LibraryError("psutil is missing", tries=["pip install psutil"]) from error
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
