"""llama.cpp's own tokenizer, for files whose tokenizer cannot be rebuilt exactly."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from nanorun.errors import EngineError
from nanorun.tokens.token_list import Kind, TokenList


class EngineTokenizer:
    """llama.cpp's tokenizer.

    Args:
        llama: The binding.
        vocab: The vocabulary of the loaded model.
        tokens: The file's list of tokens, if it has one.
    """

    def __init__(self, llama: Any, vocab: Any, tokens: TokenList | None) -> None:
        self._llama = llama
        self._vocab = vocab
        self._defined_markup = _defined_markup(tokens)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text, without a BOS.

        Raises:
            EngineError: If the tokenizer refuses the text.
        """
        if special or self._defined_markup is None:
            return self._tokenize(text, special=special)
        # llama.cpp matches user-defined tokens even in plain text; a cut after their first
        # character makes them text again.
        cuts = [match.start() + 1 for match in self._defined_markup.finditer(text)]
        parts = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
        return [token for part in parts for token in self._tokenize(part, special=False)]

    def parts(self, text: str) -> Iterator[str]:
        """The text itself: where its pre-tokenizer could not tell is not known."""
        yield text

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; control tokens give their text."""
        buffer = ctypes.create_string_buffer(256)
        n = self._llama.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = self._llama.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[:n]

    def _tokenize(self, text: str, *, special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        n_max = len(data) + 8
        buffer = (ctypes.c_int32 * n_max)()
        n = self._llama.llama_tokenize(self._vocab, data, len(data), buffer, n_max, False, special)
        if n < 0:
            raise EngineError(f"a text of {len(data)} bytes could not be tokenized")
        return list(buffer[:n])


def _defined_markup(tokens: TokenList | None) -> re.Pattern[str] | None:
    """Matches user-defined tokens that look like tags."""
    markup = tokens.markup() if tokens else []
    texts = [text for text, kind in markup if kind == Kind.USER_DEFINED]
    if not texts:
        return None
    texts.sort(key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)))
