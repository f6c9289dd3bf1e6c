"""The tokenizer.json of a GGUF: the one that it carries, or one rebuilt from what it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nanorun.tokens.families import FAMILIES
from nanorun.tokens.token_list import Kind, TokenList

KEY_JSON = "tokenizer.huggingface.json"
"""GGUF's own key for a tokenizer.json."""

Definition = dict[str, Any]
"""A tokenizer.json."""


def carried_definition(metadata: Mapping[str, Any]) -> Definition | None:
    """The tokenizer.json that a GGUF carries, if it is one at all."""
    text = metadata.get(KEY_JSON)
    if not isinstance(text, str):
        return None
    try:
        definition = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return definition if isinstance(definition, dict) else None


def rebuilt_definition(metadata: Mapping[str, Any], tokens: TokenList) -> Definition | None:
    """A tokenizer.json from tokens, merges and the named pre-tokenizer.

    Returns:
        None where the file is of another kind, or names a pre-tokenizer that is not known exactly.
    """
    family = FAMILIES.get(str(metadata.get("tokenizer.ggml.pre")))
    merges = metadata.get("tokenizer.ggml.merges")
    is_bpe = metadata.get("tokenizer.ggml.model") == "gpt2"
    if family is None or not is_bpe or not isinstance(merges, list):
        return None
    used = [
        (i, text, kind)
        for i, (text, kind) in enumerate(zip(tokens.texts, tokens.kinds, strict=True))
        if kind != Kind.UNUSED
    ]
    return {
        "version": "1.0",
        "added_tokens": [
            added_token(i, text, special=kind == Kind.CONTROL)
            for i, text, kind in used
            if kind in (Kind.CONTROL, Kind.USER_DEFINED)
        ],
        "pre_tokenizer": family.pre_tokenizer(),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                    "use_regex": True},
        "model": {"type": "BPE", "ignore_merges": family.looks_up_whole,
                  "vocab": {text: i for i, text, _ in used}, "merges": merges},
    }  # fmt: skip


def added_token(i: int, text: str, *, special: bool) -> dict[str, Any]:
    """A token that is found in the text before it is split."""
    return {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": special}  # fmt: skip


def without_markup(definition: Definition, tokens: TokenList) -> Definition:
    """The same tokenizer for what people typed: no text of it becomes markup.

    Besides the added tokens, the model's vocabulary may hold the texts (a word that is a token is
    taken whole) and merges may build them.
    """
    markup = {text for text, _ in tokens.markup()}
    model = definition["model"]
    added = definition.get("added_tokens") or []
    return {
        **definition,
        "added_tokens": [token for token in added if token["content"] not in markup],
        "post_processor": None,
        "model": {
            **model,
            "vocab": {text: i for text, i in model["vocab"].items() if text not in markup},
            "merges": [m for m in model["merges"] if not _touches(m, markup)],
        },
    }  # fmt: skip


def _touches(merge: str | list[str], markup: set[str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in markup or right in markup or left + right in markup
