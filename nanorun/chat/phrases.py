"""Finding phrases in text that arrives in pieces of any size, in one pass over it."""

from __future__ import annotations

import re
from collections.abc import Iterable


class PhraseMatcher:
    """Looks for the first of several phrases to be complete (Aho and Corasick's automaton).

    It keeps only how much of a phrase the text so far ends with, so each character is looked at
    once however the text is cut, and the owner knows how much to hold back: `n_held`.
    """

    def __init__(self, phrases: Iterable[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self._depth = [0]
        self._found: list[tuple[str, ...]] = [()]
        for phrase in dict.fromkeys(filter(None, phrases)):
            self._add(phrase)
        self._link()
        starts = "".join(map(re.escape, self._next[0]))
        # With no phrases, a pattern that matches nowhere.
        self._start = re.compile(f"[{starts}]" if starts else r"(?!)")
        self._state = 0

    @property
    def n_held(self) -> int:
        """Characters at the end of the text so far that may be the beginning of a phrase."""
        return self._depth[self._state]

    def reset(self) -> None:
        """Forget the text so far."""
        self._state = 0

    def find(self, text: str, start: int) -> tuple[int, tuple[str, ...]]:
        """Read `text` from `start` up to the end of the first phrase completed in it.

        Returns:
            The offset after what was read, and the phrases that end there, longest first; none
            if all was read. The next call goes on from there.
        """
        state, i = self._state, start
        found: tuple[str, ...] = ()
        while i < len(text) and not found:
            if not state:
                match = self._start.search(text, i)
                if match is None:
                    i = len(text)
                    break
                i = match.start()
            state = self._step(state, text[i])
            found = self._found[state]
            i += 1
        self._state = state
        return i, found

    def _step(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(char, 0)

    def _add(self, phrase: str) -> None:
        state = 0
        for char in phrase:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self._depth.append(self._depth[state] + 1)
                self._found.append(())
            state = self._next[state][char]
        self._found[state] = (phrase,)

    def _link(self) -> None:
        """Link each state to the longest shorter one that the text also ends with."""
        queue = list(self._next[0].values())
        for state in queue:  # grows while it is read: breadth first
            for char, child in self._next[state].items():
                shorter = self._step(self._fallback[state], char)
                self._fallback[child] = shorter
                self._found[child] += self._found[shorter]
                queue.append(child)
