"""The vocabulary of a source model, read from tokenizer.json and its companions directly.

llama.cpp implements each pre-tokenizer under a name of its own. The name is chosen by the regex
that tokenizer.json states; one that has no counterpart is refused, because a guess would split
text differently and make the model worse without a word.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import Any, NoReturn

from nanorun.errors import ModelError
from nanorun.tokens.definition import added_token
from nanorun.tokens.families import LLAMA3_REGEX, TEKKEN_REGEX
from nanorun_converters.family.templates import DEFAULT, read_chat_templates
from nanorun_converters.source.source_model import SourceModel

log = logging.getLogger(__name__)

CHAT_STOP = "<|im_end|>"
TOKENIZER_FILE = "tokenizer.json"
_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")

# Regex in tokenizer.json -> tokenizer.ggml.pre (llama-vocab.cpp). llama.cpp's converter names the
# pre-tokenizer by a hash of the ids of a probe text instead. With the vocabulary that Nemotron's
# descends from, both of these give that text the same ids, and only an added BOS tells "tekken"
# from "pixtral" there: the label says "pixtral" whatever the regex is.
PRE_TOKENIZERS = {TEKKEN_REGEX: "tekken", LLAMA3_REGEX: "pixtral"}


class TokenType(IntEnum):
    """llama.cpp's token types."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a GGUF says about its tokenizer."""

    pre: str
    """llama.cpp's name of the pre-tokenizer."""
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    """`left right`; a space inside a part stands as U+0120."""
    special_ids: dict[str, int]
    """`bos`, `eos`, `unknown`, `padding`: those that are known."""
    add_bos: bool
    add_eos: bool
    chat_templates: dict[str, str] = field(default_factory=dict)
    """By name; `default` is the one to use."""
    json: str = ""
    """The tokenizer.json, complete: with the tokens that only its companions name."""


def read_vocabulary(
    source: SourceModel, config: dict[str, Any], n_vocab: int, template: str | None = None
) -> Vocabulary:
    """Read the tokenizer of a source model.

    Args:
        source: The source model.
        config: Its config.json.
        n_vocab: Rows of its embedding.
        template: The chat template to take instead of the source's, if a person chose one.

    Raises:
        ModelError: If a part of it is missing, damaged, or has no counterpart in the engine.
    """
    reader = _Reader(source, config, n_vocab)
    tokens, types = reader.tokens()
    add_bos, add_eos = reader.added_ends()
    templates = read_chat_templates(source) if template is None else {DEFAULT: template}
    return Vocabulary(
        pre=reader.pre_tokenizer(),
        tokens=tokens,
        types=types,
        merges=reader.merges(tokens),
        special_ids=reader.special_ids(tokens, templates.get(DEFAULT, "")),
        add_bos=add_bos,
        add_eos=add_eos,
        chat_templates=templates,
        json=reader.complete_json(),
    )


class _Reader:
    """tokenizer.json and what it is read with."""

    def __init__(self, source: SourceModel, config: dict[str, Any], n_vocab: int) -> None:
        self.where = str(source.origin / TOKENIZER_FILE)
        self.json = source.read_json(TOKENIZER_FILE)
        self.tokenizer_config = source.find_json("tokenizer_config.json") or {}
        self.added_file = source.find_json("added_tokens.json") or {}
        self.config = config
        self.n_vocab = n_vocab
        self.model = self._object("model")
        self.added = self._added_tokens()
        self.companions = self._companions()
        self.added |= self.companions
        self._check_model()

    def pre_tokenizer(self) -> str:
        """llama.cpp's name of the pre-tokenizer."""
        regex = _split_regex(self.json.get("pre_tokenizer"))
        if regex not in PRE_TOKENIZERS:
            raise ModelError(
                f"{self.where}: pre_tokenizer: none that the engine has a counterpart for",
                facts=[
                    f"found: {regex or self.json.get('pre_tokenizer')!r:.300}",
                    f"known: the regexes that llama.cpp calls {', '.join(PRE_TOKENIZERS.values())}",
                ],
            )
        return PRE_TOKENIZERS[regex]

    def tokens(self) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
        """Every token's text and type; ids without a token become unused ones."""
        text_of: dict[int, str] = {}
        for text, i in self._vocab().items():
            if text_of.setdefault(i, text) != text:
                self._refuse(f"id {i}", f"one token, {text_of[i]!r}", f"another, {text!r}")
        for i, token in self.added.items():
            if text_of.setdefault(i, token["content"]) != token["content"]:
                self._refuse(f"id {i}", f"token {text_of[i]!r}", f"added {token['content']!r}")
        tokens = tuple(text_of.get(i, f"[PAD{i}]") for i in range(self.n_vocab))
        if len(set(tokens)) != len(tokens):
            # The engine keeps a map from text to id and aborts if it is the smaller of the two.
            twice, _ = Counter(tokens).most_common(1)[0]
            self._refuse("vocabulary", "each token once", f"{twice!r} twice")
        return tokens, tuple(self._type(i, i in text_of) for i in range(self.n_vocab))

    def merges(self, tokens: Sequence[str]) -> tuple[str, ...]:
        """The merge rules in order."""
        entries = self.model.get("merges")
        if not isinstance(entries, list):
            self._refuse("model.merges", "a list", repr(entries)[:60])
        pairs = [self._merge(entry) for entry in entries]
        if self.model.get("ignore_merges") is not True:
            self._check_merges_build(tokens, pairs)
        return tuple(f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}" for left, right in pairs)

    def special_ids(self, tokens: Sequence[str], template: str) -> dict[str, int]:
        """Ids of the special tokens; the end is the one that ends a chat turn where there is one.

        Published GGUFs of Nemotron do the same: with `</s>`, which config.json names, a chat runs
        on past the end of the turn.
        """
        id_of = {text: i for i, text in enumerate(tokens)}
        found = {
            name: self._special_id(key, id_of)
            for name, key in (
                ("bos", "bos"),
                ("eos", "eos"),
                ("unknown", "unk"),
                ("padding", "pad"),
            )
        }
        if CHAT_STOP in template and CHAT_STOP in id_of:
            found["eos"] = id_of[CHAT_STOP]
        return {name: i for name, i in found.items() if i is not None}

    def added_ends(self) -> tuple[bool, bool]:
        """Whether the tokenizer puts BOS before and EOS after a text."""
        processor = self.json.get("post_processor")
        if processor is None:
            flags = (self.tokenizer_config.get(f"add_{end}_token") for end in ("bos", "eos"))
            add_bos, add_eos = (flag is True for flag in flags)
            return add_bos, add_eos
        steps = processor.get("processors", [processor]) if isinstance(processor, dict) else None
        if not isinstance(steps, list):
            self._refuse("post_processor", "an object, or a list of them", f"{processor!r:.80}")
        add_bos = add_eos = False
        for step in steps:
            match step:
                case {"type": "TemplateProcessing", "single": list(single)}:
                    add_bos, add_eos = self._ends_of_template(single)
                case {"type": "ByteLevel"}:
                    pass
                case _:
                    self._refuse(
                        "post_processor", "ByteLevel or TemplateProcessing", f"{step!r:.80}"
                    )
        return add_bos, add_eos

    def _ends_of_template(self, single: list[Any]) -> tuple[bool, bool]:
        # Upper case A is the text, S a token beside it.
        kinds = "".join(_kind_of_piece(part) for part in single)
        if not re.fullmatch("S?AS?", kinds):
            self._refuse("post_processor", "at most one token around the text", f"{single!r:.80}")
        return kinds[0] == "S", kinds[-1] == "S"

    def _check_model(self) -> None:
        supported: dict[str, tuple[object, ...]] = {
            "type": ("BPE",),
            "dropout": (None, 0.0),
            "byte_fallback": (False, None),
            "continuing_subword_prefix": (None, ""),
            "end_of_word_suffix": (None, ""),
        }
        for key, values in supported.items():
            if self.model.get(key) not in values:
                self._refuse(f"model.{key}", repr(values[0]), repr(self.model.get(key))[:60])
        if self.json.get("normalizer") is not None:
            self._refuse("normalizer", "none", repr(self.json["normalizer"])[:80])

    def _vocab(self) -> dict[str, int]:
        vocab = self.model.get("vocab")
        if not isinstance(vocab, dict) or not vocab:
            self._refuse("model.vocab", "an object of tokens and ids", repr(vocab)[:60])
        for text, i in vocab.items():
            self._check_token(text, i)
        return vocab

    def _added_tokens(self) -> dict[int, dict[str, Any]]:
        entries = self.json.get("added_tokens") or []
        if not isinstance(entries, list):
            self._refuse("added_tokens", "a list", repr(entries)[:60])
        for entry in entries:
            if not isinstance(entry, dict):
                self._refuse("added_tokens", "objects", repr(entry)[:80])
            self._check_token(entry.get("content"), entry.get("id"))
            if any(entry.get(flag) for flag in ("single_word", "lstrip", "rstrip")):
                log.warning("%s: %r: strips spaces around it, which other runners do not",
                            self.where, entry["content"])  # fmt: skip
        return {entry["id"]: entry for entry in entries}

    def _companions(self) -> dict[int, dict[str, Any]]:
        """Tokens that only tokenizer_config.json or added_tokens.json name, by id."""
        vocab = self._vocab()
        known = {*vocab.values(), *self.added}
        found: dict[int, dict[str, Any]] = {}
        decoder = self.tokenizer_config.get("added_tokens_decoder")
        for key, entry in (decoder if isinstance(decoder, dict) else {}).items():
            i = int(key) if key.isdecimal() else -1
            if i in known:
                continue
            text = entry.get("content") if isinstance(entry, dict) else None
            self._check_token(text, i)
            flags = {flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}
            found[i] = added_token(i, str(text), special=False) | flags
        for text, i in self.added_file.items():
            if i not in known and i not in found:
                self._check_token(text, i)
                found[i] = added_token(i, text, special=False)
        return found

    def complete_json(self) -> str:
        """The tokenizer.json with the tokens that only its companions name."""
        if not self.companions:
            return json.dumps(self.json, ensure_ascii=False)
        vocab = {**self._vocab(), **{token["content"]: i for i, token in self.companions.items()}}
        added = [*(self.json.get("added_tokens") or []), *self.companions.values()]
        model = {**self.model, "vocab": vocab}
        complete = {**self.json, "added_tokens": added, "model": model}
        return json.dumps(complete, ensure_ascii=False)

    def _check_token(self, text: object, i: object) -> None:
        if not isinstance(text, str) or not text:
            self._refuse("a token", "text that is not empty", repr(text)[:60])
        if type(i) is not int or not 0 <= i < self.n_vocab:
            raise ModelError(
                f"{self.where}: token {text!r:.60}: expected an id below vocab_size {self.n_vocab},"
                f" found {i!r}",
                facts=[
                    f"vocab_size in config.json is {self.n_vocab}, the rows of the embedding",
                    "transformers' model.resize_token_embeddings(len(tokenizer)) adds the rows",
                ],
            )

    def _type(self, i: int, exists: bool) -> TokenType:
        if not exists:
            return TokenType.UNUSED
        token = self.added.get(i)
        if token is None:
            return TokenType.NORMAL
        text = token["content"]
        looks_special = text.startswith("<|") and text.endswith("|>")
        special = token.get("special") is True or looks_special
        return TokenType.CONTROL if special else TokenType.USER_DEFINED

    def _merge(self, entry: object) -> tuple[str, str]:
        parts = entry.split(" ") if isinstance(entry, str) else entry
        if isinstance(parts, list) and len(parts) == 2:
            left, right = parts
            if isinstance(left, str) and isinstance(right, str) and left and right:
                return left, right
        self._refuse("model.merges", "pairs of texts", repr(entry)[:80])

    def _check_merges_build(self, tokens: Sequence[str], pairs: list[tuple[str, str]]) -> None:
        """Check that looking a word up whole, as the engine does, equals merging it up."""
        rank_of = {pair: i for i, pair in enumerate(pairs)}
        for i, text in enumerate(tokens):
            if self._type(i, text != f"[PAD{i}]") is TokenType.NORMAL and not _builds(
                text, rank_of
            ):
                self._refuse(
                    "model.ignore_merges", "true, as the engine looks words up whole",
                    f"false, and no merges that build {text!r:.60}",
                )  # fmt: skip

    def _special_id(self, key: str, id_of: dict[str, int]) -> int | None:
        named = self.tokenizer_config.get(f"{key}_token")
        text = named.get("content") if isinstance(named, dict) else named
        if isinstance(text, str) and text in id_of:
            return id_of[text]
        ids = self.config.get(f"{key}_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        return first if type(first) is int and 0 <= first < self.n_vocab else None

    def _object(self, key: str) -> dict[str, Any]:
        value = self.json.get(key)
        if not isinstance(value, dict):
            self._refuse(key, "an object", repr(value)[:60])
        return value

    def _refuse(self, what: str, expected: str, found: str) -> NoReturn:
        raise ModelError(f"{self.where}: {what}: expected {expected}, found {found}")


def _kind_of_piece(part: object) -> str:
    match part:
        case {"Sequence": _}:
            return "A"
        case {"SpecialToken": _}:
            return "S"
        case _:
            return "?"


def _split_regex(pre_tokenizer: Any) -> str:
    """The regex of a byte-level pre-tokenizer that isolates its matches; "" for any other."""
    match pre_tokenizer:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": str(regex)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return regex
        case _:
            return ""


def _builds(text: str, rank_of: dict[tuple[str, str], int]) -> bool:
    """Whether merging `text` character by character, lowest rank first, gives it back whole."""
    parts = list(text)
    while len(parts) > 1:
        pairs = list(pairwise(parts))
        best = min(pairs, key=lambda pair: rank_of.get(pair, len(rank_of)))
        if best not in rank_of:
            return False
        i = pairs.index(best)
        parts[i : i + 2] = [best[0] + best[1]]
    return True
