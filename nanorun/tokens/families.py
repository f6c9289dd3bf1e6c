r"""The pre-tokenizers that GGUF names, as their model families published them.

llama.cpp rewrites these regexes for an engine without `\p{M}`, which splits words at combining
marks. The originals are what the models were trained with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TEKKEN_REGEX = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Family:
    """How the models of one `tokenizer.ggml.pre` split text."""

    regex: str | None
    """None for GPT-2's, which the byte-level pre-tokenizer has built in."""
    looks_up_whole: bool
    """Whether a word that is a token is taken as it is, whatever the merges say."""

    def pre_tokenizer(self) -> dict[str, Any]:
        """The part of a tokenizer.json."""
        if self.regex is None:
            return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True,
                    "trim_offsets": True}  # fmt: skip
        split = {"type": "Split", "pattern": {"Regex": self.regex}, "behavior": "Isolated",
                 "invert": False}  # fmt: skip
        as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False,
                    "trim_offsets": True}  # fmt: skip
        return {"type": "Sequence", "pretokenizers": [split, as_bytes]}


_LLAMA3 = Family(LLAMA3_REGEX, looks_up_whole=True)
FAMILIES = {
    "tekken": Family(TEKKEN_REGEX, looks_up_whole=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "pixtral": _LLAMA3,
    "gpt-2": Family(None, looks_up_whole=False),
}
"""By `tokenizer.ggml.pre`. Names that are not here cannot be rebuilt exactly."""
