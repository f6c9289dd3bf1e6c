"""Header values on which the engine ends its process, where it should report an error.

Each is an assertion of llama.cpp as llama-cpp-python 0.3.36 has it: in `load_hparams` of
llama-model.cpp, `llama_vocab::impl::load` and the graph's pooling and masks. `HybridArch.validate`
and `read_gguf` hold the assertions about sizes and about the file; here are the rest.
"""

from __future__ import annotations

from collections import Counter
from typing import NoReturn

from nanorun.errors import ModelError
from nanorun.model.gguf import GgufFile

ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
TOKENIZERS = ("gpt2", "no_vocab", "none")
"""Byte-level BPE, which the family has, and none; of others the loader asserts on their content."""
MAX_POOLING_TYPE = 4


def check_loadable(gguf: GgufFile) -> None:
    """Check the values that the engine asserts on, before it sees the file.

    Raises:
        ModelError: Naming the key, what was expected and what was found.
    """
    _check_expert_counts(gguf)
    _check_choices(gguf)
    _check_tokens(gguf)


def _check_expert_counts(gguf: GgufFile) -> None:
    n_expert = gguf.find(f"{gguf.architecture}.expert_count", int) or 0
    key = f"{gguf.architecture}.expert_used_count"
    used = gguf.metadata.get(key, 0)
    # The largest counts, be it that of a layer without experts.
    n_used = max(used, default=0) if isinstance(used, list) else used
    if n_used > n_expert:
        _refuse(gguf, key, f"at most expert_count {n_expert}", n_used)
    key = f"{gguf.architecture}.expert_group_count"
    n_groups = gguf.find(key, int) or 0
    if n_groups and not n_expert:
        _refuse(gguf, key, "0 in a model without experts", n_groups)


def _check_choices(gguf: GgufFile) -> None:
    key = f"{gguf.architecture}.rope.scaling.type"
    scaling = gguf.find(key, str)
    if scaling is not None and scaling not in ROPE_SCALINGS:
        _refuse(gguf, key, f"one of {', '.join(ROPE_SCALINGS)}", repr(scaling))
    key = f"{gguf.architecture}.attention.causal"
    if gguf.find(key, bool) is False:
        _refuse(gguf, key, "true, as of a model that writes text", "false")
    key = f"{gguf.architecture}.pooling_type"
    pooling = gguf.find(key, int) or 0
    if not 0 <= pooling <= MAX_POOLING_TYPE:
        _refuse(gguf, key, f"0 to {MAX_POOLING_TYPE}", pooling)


def _check_tokens(gguf: GgufFile) -> None:
    key = "tokenizer.ggml.model"
    model = gguf.find(key, str)
    if model is not None and model not in TOKENIZERS:
        _refuse(gguf, key, f"one of {', '.join(TOKENIZERS)}", repr(model))
    key = "tokenizer.ggml.tokens"
    found = gguf.find(key, list) or []
    # The engine gives empty tokens this name, and then wants every name once.
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(found)]
    if len(set(tokens)) != len(tokens):
        twice, _ = Counter(tokens).most_common(1)[0]
        places = [i for i, text in enumerate(tokens) if text == twice][:2]
        at = " and ".join(map(str, places))
        _refuse(gguf, key, "each token once", f"{twice!r:.80} at {at}")


def _refuse(gguf: GgufFile, key: str, expected: str, found: object) -> NoReturn:
    raise ModelError(f"{gguf.path}: key {key!r}: expected {expected}, found {found}")
