"""What a reply may say next: nothing is asked of its thinking, its answer follows a grammar.

The mask of the next token is computed in another thread while the engine evaluates the last one.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

from nanorun.runtime.reply.grammar import MakeMatcher, Matcher
from nanorun.runtime.sampling.draw import Ids

# llguidance recurses into a regular expression until it has built too many parts of it, which
# needs up to 32 MiB with `(a{1000}){1000}`; only what is used becomes memory.
_STACK_BYTES = 64 * 2**20


class Constraint:
    """Follows one reply.

    Args:
        reply: Grammar of everything after the thinking; None for free text.
        call: Grammar of a call, for text that is free until it calls a tool.
        call_token: Id of `<tool_call>`, which begins a call and ends thinking.
        ends_with_call: Whether the reply is over after one call.
    """

    def __init__(
        self,
        *,
        reply: MakeMatcher | None = None,
        call: MakeMatcher | None = None,
        call_token: int = -1,
        ends_with_call: bool = False,
    ) -> None:
        self._reply = reply
        self._call = call
        self._call_token = call_token
        self._ends_with_call = ends_with_call
        self._matcher: Matcher | None = None
        self._mask: Future[Ids] | None = None
        self.is_over = False
        """Whether the reply is complete."""

    def allowed(self) -> Ids | None:
        """Ids that may come next; None for all."""
        return None if self._mask is None else self._mask.result()

    def answer_begins(self) -> None:
        """The thinking has ended, or there was none."""
        if self._reply is not None and self._matcher is None:
            self._matcher = self._reply()
            self._look_ahead()

    def take(self, token: int) -> None:
        """Take note of a token, sampled or forced."""
        if self._matcher is None:
            if token != self._call_token:
                return
            make = self._reply or self._call
            self._matcher = make() if make is not None else None
        if self._matcher is None:
            return
        self._mask = None
        _thread().submit(self._matcher.consume, token).result()
        if not self._matcher.is_over:
            self._look_ahead()
        elif self._reply is not None or self._ends_with_call:
            self.is_over = True
        else:
            self._matcher = None  # free text, until the next call

    def _look_ahead(self) -> None:
        assert self._matcher is not None
        self._mask = _thread().submit(self._matcher.allowed)


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
