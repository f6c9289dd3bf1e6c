"""Grammars for the vocabulary of one model, compiled by llguidance."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from threading import Lock
from typing import Any, TypeVar

import numpy as np

from nanorun.errors import LibraryError, UsageError
from nanorun.runtime.sampling.draw import Ids

# More than any schema that people write; llguidance's own default would let one take seconds.
_MAX_GRAMMAR_CHARS = 500_000
_MOST_CACHED = 16
"""Forms kept compiled: an agent sends the same tools with every request."""
# Lines of the grammar that a message repeats: `   3 | answer: ...`
_ECHO = re.compile(r"\s*\d+ \| ")


T = TypeVar("T")


class GrammarCompiler:
    """Compiles grammars; builds llguidance's tokenizer once, which takes about a second.

    Args:
        vocab: llama.cpp's vocabulary.
        end_token: The token that ends a turn.
    """

    def __init__(self, vocab: Any, end_token: int) -> None:
        self._vocab = vocab
        self._end_token = end_token
        self._cache: OrderedDict[str, Any] = OrderedDict()  # the one used last at the end
        self._cache_lock = Lock()

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            from llguidance.llamacpp import lltokenizer_from_vocab
        except ImportError as error:
            raise LibraryError(
                "llguidance is missing, so replies cannot be held to a grammar",
                facts=[str(error)],
                tries=["pip install llguidance"],
            ) from error
        return lltokenizer_from_vocab(self._vocab, eos_token=self._end_token)

    def cached(self, key: str, make: Callable[[], T]) -> T:
        """What was made for the key before, or is made now; failures are not kept.

        Args:
            key: All that the result depends on.
            make: Called without the lock, so two threads may make the same.
        """
        with self._cache_lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                found: T = self._cache[key]
                return found
        made = make()
        with self._cache_lock:
            self._cache[key] = made
            if len(self._cache) > _MOST_CACHED:
                self._cache.popitem(last=False)
        return made

    def compile(self, lark: str, *, may_break: bool = False) -> MakeMatcher:
        """Compile a grammar in llguidance's dialect of Lark.

        Args:
            lark: The grammar.
            may_break: Whether a reply goes on freely where the grammar turns out too complex.

        Returns:
            Makes a matcher that stands at the grammar's beginning; cheap.

        Raises:
            UsageError: If the grammar has no meaning, with what llguidance says of it.
        """
        from llguidance import LLMatcher

        if len(lark) > _MAX_GRAMMAR_CHARS:
            raise UsageError(f"a grammar of {len(lark)} characters is too long")
        first = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(lark), log_level=0)
        if first.is_error():
            raise UsageError("the grammar cannot be used", facts=_explain(first.get_error()))
        n_vocab = self._tokenizer.vocab_size
        return lambda: Matcher(first.deep_copy(), n_vocab, may_break=may_break)


class Matcher:
    """Where a reply stands in a grammar.

    Args:
        matcher: llguidance's.
        n_vocab: Tokens of the vocabulary.
        may_break: Whether anything may follow where the grammar turns out too complex.
    """

    def __init__(self, matcher: Any, n_vocab: int, *, may_break: bool = False) -> None:
        self._matcher = matcher
        self._n_vocab = n_vocab
        self._may_break = may_break
        self._mask = np.zeros((1, -(-n_vocab // 32)), np.int32)

    def allowed(self) -> Ids:
        """Ids of the tokens that may come next; may run in any thread, one at a time.

        The interpreter's lock is released meanwhile.

        Raises:
            UsageError: If the grammar turned out too complex, and may not break.
        """
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._mask)
        if self._matcher.is_error():
            if self._may_break:
                return np.arange(self._n_vocab)
            raise UsageError("the grammar broke down", facts=_explain(self._matcher.get_error()))
        bits = np.unpackbits(self._mask[0].view(np.uint8), bitorder="little")
        return np.flatnonzero(bits)

    def consume(self, token: int) -> None:
        """Go on with a token; one that breaks the grammar shows in `allowed`."""
        self._matcher.consume_token(token)

    def expected(self) -> list[int]:
        """Tokens of the text that must follow; empty where there is a choice."""
        return list(self._matcher.compute_ff_tokens())

    def n_admitted(self, tokens: Sequence[int]) -> int:
        """How many of some tokens may follow each other from here."""
        return int(self._matcher.validate_tokens(list(tokens)))

    @property
    def is_over(self) -> bool:
        """Whether the form is complete, so that nothing more may come."""
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())


MakeMatcher = Callable[[], Matcher]
"""Makes a matcher that stands at the beginning of its grammar."""


def _explain(text: str) -> list[str]:
    """Llguidance's words, without its inner state, blank lines and the echo of the grammar."""
    text = text.partition("<state>")[0].replace("NoExtensionBias", "nothing that fits can follow")
    lines = [line.rstrip() for line in text.splitlines() if line.strip(" ^")]
    return [line for line in lines if not _ECHO.match(line)][:6]
