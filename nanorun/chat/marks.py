"""Marks for the control tokens that a template spells, and what of its output is text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby, takewhile
from operator import itemgetter

from jinja2 import nodes

from nanorun.chat.prompt import Boundary, BoundaryKind, RenderedPrompt, Segment
from nanorun.errors import ModelError

SURROGATE = re.compile("[\ud800-\udfff]")
"""What marks are: characters that no decoded text can hold."""
_FIRST_MARK = 0xD800
_N_MARKS = 0xDFFF - 0xD800  # the last is `template.py`'s own


class Marks:
    """One lone surrogate for each control token that a template spells."""

    def __init__(self, special_tokens: Iterable[str], spelled_in: Sequence[str]) -> None:
        tokens = sorted({token for token in special_tokens if token})
        self._special = re.compile(_any_of(tokens)) if tokens else None
        used = [token for token in tokens if any(token in source for source in spelled_in)]
        if len(used) > _N_MARKS:
            raise ModelError(f"the chat template spells {len(used)} different control tokens")
        self._mark_of = {token: chr(_FIRST_MARK + i) for i, token in enumerate(used)}
        self._token_of = {mark: token for token, mark in self._mark_of.items()}

    def mark(self, text: str) -> str:
        """`text` with marks for the control tokens in it."""
        if self._special is None:
            return text
        return self._special.sub(lambda match: self._mark_of.get(match[0], match[0]), text)

    def unmark(self, text: str) -> str:
        """`text` with the control tokens that its marks stand for."""
        return SURROGATE.sub(lambda match: self._token_of.get(match[0], ""), text)

    def mark_constants(self, tree: nodes.Template) -> None:
        """Mark the control tokens in the texts of a parsed template."""
        for data in tree.find_all(nodes.TemplateData):
            data.data = self.mark(data.data)
        for const in tree.find_all(nodes.Const):
            if isinstance(const.value, str):
                const.value = self.mark(well_formed(const.value))

    def prompt(
        self, marked: str, places: Sequence[tuple[int, BoundaryKind, int]]
    ) -> RenderedPrompt:
        """Turn marks back into tokens, and runs of text with typed tokens into plain segments."""
        joined: list[tuple[list[str], bool]] = []
        offset_of: dict[int, int] = {}
        at = n_chars = 0
        for piece in re.split("([\ud800-\udfff])", marked):
            offset_of[at] = n_chars
            text = self._token_of.get(piece, piece)
            if text:
                special = text is not piece or self._is_harmless(text)
                if not joined or joined[-1][1] is not special:
                    joined.append(([], special))
                joined[-1][0].append(text)
            at += len(piece)
            n_chars += len(text)
        segments = tuple(Segment("".join(texts), special) for texts, special in joined)
        boundaries = (Boundary(offset_of[place], kind, i) for place, kind, i in places)
        return RenderedPrompt(segments, tuple(boundaries))

    def _is_harmless(self, text: str) -> bool:
        return self._special is None or self._special.search(text) is None


def _any_of(tokens: Sequence[str]) -> str:
    """A pattern for any of the sorted `tokens`, the longest that fits, as tokenizers match them.

    It branches letter by letter: a vocabulary has a thousand control tokens that all begin alike,
    and trying each at every `<` of a long prompt takes seconds.
    """
    first, last = tokens[0], tokens[-1]
    pairs = zip(first, last, strict=False)
    n_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    prefix = first[:n_common]
    rests = [token[len(prefix) :] for token in tokens]
    branches = [list(group) for _, group in groupby(filter(None, rests), key=itemgetter(0))]
    if not branches:
        return re.escape(prefix)
    inner = "|".join(map(_any_of, branches))
    return f"{re.escape(prefix)}(?:{inner}){'?' if '' in rests else ''}"


def well_formed(text: str) -> str:
    """`text` with lone surrogates replaced: no tokenizer takes them, and marks are made of them."""
    return SURROGATE.sub("\ufffd", text)
