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
    with EngineHead(path, len(tokens)) as engine:
        return engine.logits(tokens)[1]


class EngineHead:
    """The engine's contexts of a model: that of the trunk, and that of its MTP head.

    Args:
        path: The model.
        n_ctx: Tokens that the contexts hold.
    """

    def __init__(self, path: Path, n_ctx: int) -> None:
        from nanorun.runtime.llama.binding import load_llama

        self.llama = llama = load_llama()
        from llama_cpp import llama_cpp_ext

        self.ext = llama_cpp_ext
        params = llama.llama_model_default_params()
        params.n_gpu_layers, params.load_mtp = 0, True
        self.model = llama.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"the engine does not load {path}"
        self.trunk = llama.llama_init_from_model(self.model, context_params(llama, n_ctx))
        head_params = context_params(llama, n_ctx)
        head_params.ctx_type, head_params.ctx_other = llama.LLAMA_CONTEXT_TYPE_MTP, self.trunk
        self.head = llama.llama_init_from_model(self.model, head_params)
        assert self.trunk and self.head
        self.ext.llama_set_embeddings_nextn(self.trunk, True, False)
        self.ext.llama_set_embeddings_nextn(self.head, True, True)
        self.n_embd = llama.llama_model_n_embd(self.model)
        self.n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))

    def __enter__(self) -> EngineHead:
        return self

    def __exit__(self, *_: object) -> None:
        self.llama.llama_free(self.head)
        self.llama.llama_free(self.trunk)
        self.llama.llama_model_free(self.model)

    def logits(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """`(n_tokens, n_vocab)` of the trunk, and of the head, from empty contexts.

        The head's row k sees token k and the trunk's output at token k - 1.
        """
        for context in (self.trunk, self.head):
            self.llama.llama_memory_clear(self.llama.llama_get_memory(context), True)
        _decode(self.llama, self.trunk, tokens, None)
        states = _array(self.ext.llama_get_embeddings_nextn(self.trunk), len(tokens), self.n_embd)
        before = np.vstack([np.zeros((1, self.n_embd), np.float32), states[:-1]])
        _decode(self.llama, self.head, tokens, before)
        of_trunk, of_head = (
            _array(self.llama.llama_get_logits(context), len(tokens), self.n_vocab)
            for context in (self.trunk, self.head)
        )
        return of_trunk, of_head

    def draft_logits(self, tokens: list[int], drafts: list[int]) -> np.ndarray:
        """`(1 + n_drafts, n_vocab)`: of the last token, then of each draft on its own output."""
        rows = [self.logits(tokens)[1][-1]]
        i_last = len(tokens) - 1
        for i, draft in enumerate(drafts):
            state = self.ext.llama_get_embeddings_nextn_ith(self.head, i_last)
            before = _array(state, 1, self.n_embd)
            _decode(self.llama, self.head, [draft], before, first_pos=len(tokens) + i)
            rows.append(_array(self.llama.llama_get_logits(self.head), 1, self.n_vocab)[0])
            i_last = 0
        return np.stack(rows)


def _array(pointer: Any, *shape: int) -> np.ndarray:
    return np.ctypeslib.as_array(pointer, (int(np.prod(shape)),)).reshape(shape).copy()


def _decode(
    llama: Any, context: Any, tokens: list[int], states: np.ndarray | None, first_pos: int = 0
) -> None:
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
            batch.token[i], batch.pos[i], batch.logits[i] = token, first_pos + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert llama.llama_decode(context, batch) == 0
    finally:
        if states is not None:
            batch.token = pointer()
        llama.llama_batch_free(batch)
