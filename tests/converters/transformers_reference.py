"""What transformers computes, and what the engine computes, for the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

N_POSITIONS = 256


def save_random_model(folder: Path, config: dict[str, Any], seed: int) -> Any:
    """A float32 `NemotronHForCausalLM` whose every parameter matters, saved to `folder`."""
    import torch
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(seed)
    model = NemotronHForCausalLM(NemotronHConfig(**config)).float().eval()
    # The engine does not clamp dt; transformers does, from time_step_min up. It cannot be 0 from
    # the start, because a new model's dt_bias is drawn from its logarithm.
    model.config.time_step_min = 0.0
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
    with torch.no_grad():
        for name, values in model.state_dict().items():
            values.copy_(random_like(name, values))
    model.save_pretrained(folder)
    return model


def random_like(name: str, values: Any) -> Any:
    """Random values of the size that a parameter of this name has."""
    import torch

    if name.endswith("A_log"):
        return torch.empty_like(values).uniform_(0, 2.7)
    if name.endswith("dt_bias"):
        return torch.empty_like(values).uniform_(-4, 0)
    if name.endswith("e_score_correction_bias"):
        return torch.empty_like(values).normal_(0, 0.1)
    if values.ndim == 1:
        bias = 0.0 if name.endswith("bias") else 1.0
        return torch.empty_like(values).normal_(bias, 0.1)
    return torch.empty_like(values).normal_(0, values.shape[-1] ** -0.5)


def reference_logits(model: Any, tokens: list[int]) -> np.ndarray:
    """`(n_tokens, n_vocab)` from transformers."""
    import torch

    with torch.no_grad():
        return np.asarray(model(torch.tensor([tokens])).logits[0])


def engine_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """`(n_tokens, n_vocab)` from the engine, with nothing in it rounded below float32."""
    from nanorun.runtime.llama.binding import load_llama

    llama = load_llama()
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"the engine does not load {path}"
    context = llama.llama_init_from_model(model, context_params(llama, len(tokens)))
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert llama.llama_decode(context, batch) == 0
        n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        logits = np.ctypeslib.as_array(llama.llama_get_logits(context), (len(tokens) * n_vocab,))
        return logits.reshape(len(tokens), n_vocab).copy()
    finally:
        llama.llama_batch_free(batch)
        llama.llama_free(context)
        llama.llama_model_free(model)


def context_params(llama: Any, n_tokens: int) -> Any:
    """A context that rounds nothing below float32 and gives the logits of every token."""
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = n_tokens
    params.n_outputs_max = params.n_outputs_max_per_seq = n_tokens
    params.n_threads = params.n_threads_batch = 2
    params.type_k = params.type_v = 0  # F32
    params.flash_attn_type = 0
    return params


def mean_kl(reference: np.ndarray, found: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of `found` from `reference`, both logits."""
    log_p, log_q = _log_softmax(reference), _log_softmax(found)
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
