"""What a multi-token prediction head computes: by torch from the parts, and by the engine."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from tests.converters.transformers_reference import context_params, random_like


def add_random_head(folder: Path, config: dict[str, Any], seed: int) -> Any:
    """Give the source model in `folder` an MTP head; return its parts for `head_logits`.

    The head's two layers are those of a model of pattern `*E`, which transformers implements.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(seed)
    head = NemotronHForCausalLM(NemotronHConfig(**config | {"hybrid_override_pattern": "*E"}))
    head = head.float().eval()
    n_embd = config["hidden_size"]
    head.model.norm_f = torch.nn.LayerNorm(n_embd, eps=1e-5, bias=False)
    fusion = {name: torch.empty(n_embd) for name in ("enorm", "hnorm")}
    fusion["eh_proj"] = torch.empty(n_embd, 2 * n_embd)
    with torch.no_grad():
        for name, values in (*head.state_dict().items(), *fusion.items()):
            values.copy_(random_like(name, values))
    layers = {
        name.replace("model.layers.", "mtp.layers."): values.contiguous()
        for name, values in head.state_dict().items()
        if name.startswith("model.layers.")
    }
    layers |= {f"mtp.layers.0.{name}.weight": values for name, values in fusion.items()}
    layers["mtp.layers.1.final_layernorm.weight"] = head.model.norm_f.weight.detach()
    path = folder / "model.safetensors"
    save_file({**load_file(path), **layers}, path, metadata={"format": "pt"})
    return head, fusion


def head_logits(model: Any, parts: Any, tokens: list[int]) -> np.ndarray:
    """`(n_tokens, n_vocab)`: row k sees token k and the trunk's output at token k - 1."""
    import torch

    head, fusion = parts
    with torch.no_grad():
        ids = torch.tensor([tokens])
        before = torch.nn.functional.pad(model.model(ids).last_hidden_state, (0, 0, 1, 0))[:, :-1]
        embedded = model.model.embeddings(ids)
        n_embd = embedded.shape[-1]
        halves = [
            torch.nn.functional.rms_norm(x, (n_embd,), fusion[name], 1e-5)
            for x, name in ((embedded, "enorm"), (before, "hnorm"))
        ]
        fused = torch.cat(halves, -1) @ fusion["eh_proj"].T
        hidden = head.model(inputs_embeds=fused).last_hidden_state
        return np.asarray(model.lm_head(hidden)[0])


def engine_head_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """`(n_tokens, n_vocab)` from the engine's MTP context."""
    from nanorun.runtime.library import load_llama

    llama = load_llama()
    from llama_cpp import llama_cpp_ext as ext

    params = llama.llama_model_default_params()
    params.n_gpu_layers, params.load_mtp = 0, True
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"the engine does not load {path}"
    trunk = llama.llama_init_from_model(model, context_params(llama, len(tokens)))
    head_params = context_params(llama, len(tokens))
    head_params.ctx_type, head_params.ctx_other = llama.LLAMA_CONTEXT_TYPE_MTP, trunk
    head = llama.llama_init_from_model(model, head_params)
    assert trunk and head
    try:
        ext.llama_set_embeddings_nextn(trunk, True, False)
        ext.llama_set_embeddings_nextn(head, True, True)
        n_embd = llama.llama_model_n_embd(model)
        _decode(llama, trunk, tokens, None)
        states = _array(ext.llama_get_embeddings_nextn(trunk), len(tokens), n_embd)
        before = np.vstack([np.zeros((1, n_embd), np.float32), states[:-1]])
        _decode(llama, head, tokens, before)
        n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        return _array(llama.llama_get_logits(head), len(tokens), n_vocab)
    finally:
        llama.llama_free(head)
        llama.llama_free(trunk)
        llama.llama_model_free(model)


def _array(pointer: Any, *shape: int) -> np.ndarray:
    return np.ctypeslib.as_array(pointer, (int(np.prod(shape)),)).reshape(shape).copy()


def _decode(llama: Any, context: Any, tokens: list[int], states: np.ndarray | None) -> None:
    """Decode all tokens at once, each with a logits row, and with a hidden state if given."""
    n_embd = 0 if states is None else states.shape[1]
    batch = llama.llama_batch_init(len(tokens), n_embd, 1)
    pointer = ctypes.POINTER(ctypes.c_int32)
    ids = (ctypes.c_int32 * len(tokens))()
    if states is not None:
        # A batch of embeddings has no room for tokens; it is lent some, and must not free it.
        batch.token = ctypes.cast(ids, pointer)
        ctypes.memmove(batch.embd, states.ctypes.data, states.nbytes)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert llama.llama_decode(context, batch) == 0
    finally:
        if states is not None:
            batch.token = pointer()
        llama.llama_batch_free(batch)
