"""A tokenizer for a GGUF: exact where the file allows it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from nanorun.errors import LibraryError
from nanorun.tokens.definition import (
    Definition,
    carried_definition,
    rebuilt_definition,
    without_markup,
)
from nanorun.tokens.families import LLAMA3_REGEX, TEKKEN_REGEX
from nanorun.tokens.token_list import TokenList

# Texts are cut at about this many characters where a cut changes no token, so that a book takes
# neither memory for all of its words at once nor the interpreter's lock for long.
_CUT_CHARS = 2**16
# Between a line's end and a letter: no alternative of these two regexes reaches across.
_CUT = re.compile(r"(?<=\n)(?=[^\W\d_])")
_CUT_REGEXES = frozenset({TEKKEN_REGEX, LLAMA3_REGEX})


class Tokenizer(Protocol):
    """Makes token ids of text, and bytes of token ids."""

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text, without a BOS.

        Args:
            text: Any text; lone surrogates become question marks.
            special: Whether texts of markup in it become markup.
        """

    def parts(self, text: str) -> Iterator[str]:
        """A text in parts; their tokens one after the other are those of the text."""

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; those of markup are its text."""


class TrainedTokenizer:
    """The `tokenizers` library on a tokenizer.json; usable from any thread.

    Args:
        definition: The tokenizer.json.
        tokens: The file's list of tokens.

    Raises:
        ValueError: If the definition is none, or its ids are not those of the file.
        LibraryError: If the library is missing.
    """

    def __init__(self, definition: Definition, tokens: TokenList) -> None:
        self._tokens = tokens
        # One for each way: the library's own switch between them is not safe across threads, and
        # leaves tokens that are not "special" in what people typed.
        self._with_markup = _load(definition)
        _check_ids(self._with_markup, tokens)
        self._plain = _load(without_markup(definition, tokens))
        self._may_cut = _may_cut(definition)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text, without a BOS."""
        tokenizer = self._with_markup if special else self._plain
        text = text.encode("utf-8", "replace").decode("utf-8")
        ids: list[int] = []
        for part in self.parts(text):
            # The batch form gives up the interpreter's lock.
            ids += tokenizer.encode_batch_fast([part], add_special_tokens=False)[0].ids
        return ids

    def parts(self, text: str) -> Iterator[str]:
        """A text in parts; their tokens one after the other are those of the text."""
        return _parts(text) if self._may_cut else iter((text,))

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; those of markup are its text."""
        return self._tokens.piece(token)


def trained_tokenizer(metadata: Mapping[str, Any]) -> TrainedTokenizer | None:
    """The exact tokenizer of a GGUF: of the tokenizer.json in it, else rebuilt from its tokens.

    Returns:
        None where neither gives the tokens of the file.

    Raises:
        LibraryError: If the `tokenizers` library is missing.
    """
    tokens = TokenList.from_metadata(metadata)
    if tokens is None:
        return None
    for definition in (carried_definition(metadata), rebuilt_definition(metadata, tokens)):
        if definition is not None:
            try:
                return TrainedTokenizer(definition, tokens)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # not of this file, or of a form that the library does not know
    return None


def _load(definition: Definition) -> Any:
    try:
        from tokenizers import Tokenizer as Library
    except ImportError as error:
        raise LibraryError(
            "tokenizers is missing, which makes the tokens that a model was trained with",
            facts=[str(error)],
            tries=["pip install tokenizers"],
        ) from error
    try:
        tokenizer = Library.from_str(json.dumps(definition))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"not a tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_ids(tokenizer: Any, tokens: TokenList) -> None:
    n = len(tokens.texts)
    for text, i in tokenizer.get_vocab(with_added_tokens=True).items():
        if i >= n or tokens.texts[i] != text:
            raise ValueError(f"{text!r} is {i} in tokenizer.json and not in the file")


def _may_cut(definition: Definition) -> bool:
    """Whether a long text may be cut before letters that begin a line."""
    try:
        first = definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    except (KeyError, TypeError, IndexError):
        return False
    reaches_over = any(
        token.get("lstrip") or token.get("rstrip") or token.get("single_word")
        or "\n" in token["content"]
        for token in definition.get("added_tokens") or []
    )  # fmt: skip
    return first in _CUT_REGEXES and not definition.get("normalizer") and not reaches_over


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _CUT_CHARS:
        cut = _CUT.search(text, start + _CUT_CHARS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]
