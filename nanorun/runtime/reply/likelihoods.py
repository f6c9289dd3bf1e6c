"""Which tokens made the text that came out, and how likely they were."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from nanorun.chat.origins import Origins
from nanorun.model.chat import TokenLogprobs
from nanorun.runtime.sampling.sampler import Choice

_CHARACTERS = re.compile(rb"[\x80-\xbf]+|[^\x80-\xbf][\x80-\xbf]*")
"""UTF-8: what is left of a character that an earlier token began, and characters."""


@dataclass(frozen=True, slots=True)
class _Said:
    """A token that was said, until it is certain what of it came out."""

    choice: Choice
    place: int
    """Characters of the reply before the first that is its own, or that it completes."""
    parts: list[bytes]
    """What it adds to each character from there on."""


class Likelihoods:
    """Lists the tokens of a reply's text, as it comes out.

    A token of which the text has only a part (a stop string cut it off, or white space at the end
    was left out) is listed with that part; one of which nothing came out is not listed.

    Args:
        origins: Where the text stood in the reply.
        piece: The bytes of a token.
    """

    def __init__(self, origins: Origins, piece: Callable[[int], bytes]) -> None:
        self._origins = origins
        self._piece = piece
        self._waiting: deque[_Said] = deque()
        self._i_stretch = 0
        """Stretches of text before it lie before all that waits."""

    def add(self, choice: Choice, n_before: int) -> None:
        """Take note of a token that was just read.

        Args:
            choice: The token.
            n_before: Characters of the reply that were read before it.
        """
        parts = _CHARACTERS.findall(self._piece(choice.token))
        n_whole = len(parts) - _is_cut(parts[-1]) if parts else 0
        # What came before it may have ended within a character, which it did not complete.
        has_broken = self._origins.n_read - n_before > n_whole
        self._waiting.append(_Said(choice, n_before + has_broken, parts))

    def listed(self, n_settled: int | None) -> list[TokenLogprobs]:
        """The tokens of the text that has become certain since the last call.

        Args:
            n_settled: Characters of the reply that came out or never will; None for all.
        """
        found: list[TokenLogprobs] = []
        while self._waiting:
            said = self._waiting[0]
            if n_settled is not None and said.place + len(said.parts) > n_settled:
                break
            found += self._of_token(said)
            self._waiting.popleft()
        return found

    def _of_token(self, said: _Said) -> list[TokenLogprobs]:
        """A token's part in the thinking, in the answer, in both or neither."""
        piece, choice = self._piece, said.choice
        kinds = [self._kind(said.place + i) for i in range(len(said.parts))]
        parts = zip(kinds, said.parts, strict=True)
        alternatives = tuple((piece(token), logprob) for token, logprob in choice.alternatives)
        assert choice.logprob is not None
        return [
            TokenLogprobs(
                b"".join(part for _, part in same), choice.logprob, alternatives, in_thinking
            )
            for in_thinking, same in groupby(parts, key=lambda pair: pair[0])
            if in_thinking is not None
        ]

    def _kind(self, place: int) -> bool | None:
        """Whether a character is one of the thinking; None if it did not come out."""
        stretches = self._origins.stretches
        while self._i_stretch < len(stretches) and stretches[self._i_stretch].end <= place:
            self._i_stretch += 1
        if self._i_stretch == len(stretches) or stretches[self._i_stretch].start > place:
            return None
        return stretches[self._i_stretch].in_thinking


def _is_cut(part: bytes) -> bool:
    """Whether this is the beginning of a longer character."""
    lead = part[0]
    n_bytes = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
    return len(part) < n_bytes
