"""Phrases in a stream: the first to be complete, however the stream is cut."""

from __future__ import annotations

import re

from hypothesis import example, given
from hypothesis import strategies as st

from nanorun.chat.phrases import PhraseMatcher

PHRASES = st.lists(st.text("ab<", min_size=1, max_size=5), max_size=5)
TEXTS = st.text("ab<c", max_size=30)


def first_end(text: str, phrases: list[str]) -> int | None:
    """End of the first phrase to be complete, found the slow way."""
    ends = [m.start() + len(p) for p in phrases for m in re.finditer(f"(?={re.escape(p)})", text)]
    return min(ends, default=None)


def n_beginning(text: str, phrases: list[str]) -> int:
    """Length of the longest end of `text` with which a phrase begins."""
    return next(
        (n for n in range(len(text), 0, -1) if any(p.startswith(text[-n:]) for p in phrases)), 0
    )


@given(text=TEXTS, phrases=PHRASES)
@example("aab", ["aab", "ab", "b"])
@example("ababab", ["abac"])
def test_first_complete_phrase_is_found_and_the_rest_held(text: str, phrases: list[str]) -> None:
    matcher = PhraseMatcher(phrases)
    end, found = matcher.find(text, 0)
    expected = first_end(text, phrases)
    if expected is None:
        assert (end, found) == (len(text), ())
        assert matcher.n_held == n_beginning(text, phrases)
    else:
        assert end == expected
        there = {phrase for phrase in phrases if text[:end].endswith(phrase)}
        assert list(found) == sorted(there, key=len, reverse=True)


@given(pieces=st.lists(TEXTS, max_size=6), phrases=PHRASES)
def test_pieces_make_no_difference(pieces: list[str], phrases: list[str]) -> None:
    text = "".join(pieces)
    whole = PhraseMatcher(phrases).find(text, 0)
    matcher, n_read, found = PhraseMatcher(phrases), 0, ()
    for piece in pieces:
        end, found = matcher.find(piece, 0)
        n_read += end
        if found:
            break
    assert (n_read, found) == whole


def test_reset_forgets_what_was_begun() -> None:
    matcher = PhraseMatcher(["<think>"])
    matcher.find("a<thi", 0)
    assert matcher.n_held == 4
    matcher.reset()
    assert matcher.n_held == 0
    assert matcher.find("nk>", 0) == (3, ())


def test_search_begins_where_told() -> None:
    matcher = PhraseMatcher(["b"])
    assert matcher.find("bab", 1) == (3, ("b",))
