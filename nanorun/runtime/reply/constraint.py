"""What a reply may say next: nothing is asked of its thinking, its answer follows a grammar.

The mask of the next token is computed in another thread while the engine evaluates the last one.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

from nanorun.runtime.reply.grammar import MakeMatcher, Matcher
from nanorun.runtime.sampling.draw import Ids

# llguidance recurses into a regular expression until it has built too many parts of it, which
# needs up to 32 MiB with `(a{1000}){1000}`; only what is used becomes memory.
_STACK_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Form:
    """The form that replies to a request have: compiled once, followed by each of them."""

    reply: MakeMatcher | None = None
    """Grammar of everything after the thinking; None for free text."""
    call: MakeMatcher | None = None
    """Grammar of a call, for text that is free until it calls a tool."""
    call_token: int = -1
    """Id of `<tool_call>`, which begins a call and ends thinking."""
    ends_with_call: bool = False
    """Whether the reply is over after one call."""


class Constraint:
    """Holds one reply to its form."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._matcher: Matcher | None = None
        self._mask: Future[Ids] | None = None
        self.is_over = False
        """Whether the reply is complete."""

    def answer_begins(self) -> None:
        """The thinking has ended, or there was none."""
        if self._form.reply is not None and self._matcher is None:
            self._matcher = self._form.reply()
            self._look_ahead(self._matcher)

    def take(self, token: int) -> None:
        """Go on with a token, sampled or forced."""
        if self._matcher is None:
            begins = self._form.reply or self._form.call
            if token != self._form.call_token or begins is None:
                return
            self._matcher = begins()
        self._mask = None
        _thread().submit(self._matcher.consume, token).result()
        if not self._matcher.is_over:
            self._look_ahead(self._matcher)
        elif self._form.reply is not None or self._form.ends_with_call:
            self.is_over = True
        else:
            self._matcher = None  # free text, until the next call

    def allowed(self) -> Ids | None:
        """Ids that may come next; None for all.

        Raises:
            UsageError: If nothing may, or the grammar turned out too complex.
        """
        return None if self._mask is None else self._mask.result()

    def expected(self) -> list[int]:
        """Tokens of text that the form prescribes; the model may cut it into others."""
        if self._matcher is None or self.is_over:
            return []
        return _thread().submit(self._matcher.expected).result()

    def admitted(self, tokens: Sequence[int]) -> list[int]:
        """The beginning of a guess that the form allows."""
        if self._matcher is None or self.is_over:
            return list(tokens)
        n_admitted = _thread().submit(self._matcher.n_admitted, tokens).result()
        return list(tokens[:n_admitted])

    def _look_ahead(self, matcher: Matcher) -> None:
        self._mask = _thread().submit(matcher.allowed)


@cache
def _thread() -> ThreadPoolExecutor:
    """The thread in which matchers go on, with room for what they are asked."""
    usual = threading.stack_size(_STACK_BYTES)
    try:
        executor = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        executor.submit(int).result()  # begins the thread
    finally:
        threading.stack_size(usual)
    return executor
