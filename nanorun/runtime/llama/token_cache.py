"""Tokens of texts that come back: every turn's prompt begins with what was said before."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

# Objects and the place in the dictionary, beside the text and the tokens themselves.
_ENTRY_BYTES = 320


class TokenCache:
    """Remembers the tokens of texts, the most recently used ones; usable from any thread.

    Args:
        tokenize: Does the work.
        max_bytes: Memory it may take, about.
    """

    def __init__(self, tokenize: Callable[[str, bool], list[int]], max_bytes: int) -> None:
        self._tokenize = tokenize
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        """Held for the books only: threads tokenize beside each other."""
        self._n_bytes = 0
        self._known: OrderedDict[tuple[str, bool], array[int]] = OrderedDict()

    def __call__(self, text: str, special: bool) -> Sequence[int]:
        """Token ids of a text."""
        key = (text, special)
        with self._lock:
            tokens = self._known.get(key)
            if tokens is not None:
                self._known.move_to_end(key)
                return tokens
        tokens = array("i", self._tokenize(text, special))
        with self._lock:
            self._keep(key, tokens)
        return tokens

    def _keep(self, key: tuple[str, bool], tokens: array[int]) -> None:
        n_bytes = _n_bytes(key[0], tokens)
        if key not in self._known and n_bytes <= self._max_bytes:
            self._known[key] = tokens
            self._n_bytes += n_bytes
        while self._n_bytes > self._max_bytes:
            (old, _), of_old = self._known.popitem(last=False)
            self._n_bytes -= _n_bytes(old, of_old)


def _n_bytes(text: str, tokens: array[int]) -> int:
    return 2 * len(text) + tokens.itemsize * len(tokens) + _ENTRY_BYTES
