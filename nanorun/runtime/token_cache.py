"""Tokens of texts that come back: every turn's prompt begins with what was said before."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence


class TokenCache:
    """Remembers the tokens of texts, the most recently used ones.

    Args:
        tokenize: Does the work.
        max_chars: Text that is remembered; each character takes at most some five bytes.
    """

    def __init__(self, tokenize: Callable[[str, bool], list[int]], max_chars: int) -> None:
        self._tokenize = tokenize
        self._max_chars = max_chars
        self._n_chars = 0
        self._known: OrderedDict[tuple[str, bool], array[int]] = OrderedDict()

    def __call__(self, text: str, special: bool) -> Sequence[int]:
        """Token ids of a text."""
        key = (text, special)
        tokens = self._known.get(key)
        if tokens is not None:
            self._known.move_to_end(key)
            return tokens
        tokens = array("i", self._tokenize(text, special))
        if len(text) <= self._max_chars:
            self._known[key] = tokens
            self._n_chars += len(text)
        while self._n_chars > self._max_chars:
            (old, _), _ = self._known.popitem(last=False)
            self._n_chars -= len(old)
        return tokens
