"""A rendered prompt: its text, what in it is control tokens, and where a state is worth keeping.

Offsets count characters of the text. This module knows nothing of templates or tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

BoundaryKind = Literal["system", "user", "generation"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a prompt that is tokenized in one go.

    The tokens of a prompt are those of its segments, one after the other. Borders lie at control
    tokens only, where no merge of a BPE vocabulary could have reached across.
    """

    text: str
    special: bool
    """Whether control tokens spelled in `text` are control tokens (tokenize with `parse_special`);
    if not, somebody typed them and they are text."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """A place in a prompt that later prompts of the same conversation will share.

    It lies at a control token, so the tokens before it do not depend on the text after it.
    """

    offset: int
    """Characters of the prompt's text before it."""
    kind: BoundaryKind
    """`system`: the system and tools block ends and the first user turn begins. `user`: a later
    user turn begins. `generation`: all messages are read, the reply begins."""
    i_message: int
    """Index of the message that begins here; for `generation`, the count of messages."""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """What a template made of a conversation."""

    segments: tuple[Segment, ...]
    boundaries: tuple[Boundary, ...] = ()
    """In order of their offsets; only those that hold for sure."""

    @property
    def text(self) -> str:
        """The whole prompt."""
        return "".join(segment.text for segment in self.segments)

    def stretches(self) -> tuple[tuple[Segment, ...], ...]:
        """The segments cut at the boundaries: one group before each, and one after the last.

        Tokenizing group by group gives the same tokens, and the count of tokens before each
        boundary. There is always one group more than there are boundaries.
        """
        groups: list[tuple[Segment, ...]] = []
        rest = list(self.segments)
        done = 0
        for boundary in self.boundaries:
            group, rest = _cut(rest, boundary.offset - done)
            groups.append(tuple(group))
            done = boundary.offset
        return (*groups, tuple(rest))


@dataclass(frozen=True, slots=True)
class BegunReply:
    """A prompt that ends in the middle of its last message, the assistant's."""

    prompt: RenderedPrompt
    text: str
    """What the message says, to its end."""
    in_thinking: bool
    """Whether that is thinking, and not the answer."""
    lost_blanks: str
    """White space at the end of the message that the template leaves out."""


def _cut(segments: Sequence[Segment], n_chars: int) -> tuple[list[Segment], list[Segment]]:
    """Split segments after `n_chars` characters."""
    before: list[Segment] = []
    for i, segment in enumerate(segments):
        if n_chars < len(segment.text):
            if n_chars:
                before.append(Segment(segment.text[:n_chars], segment.special))
            tail = Segment(segment.text[n_chars:], segment.special)
            return before, [tail, *segments[i + 1 :]]
        before.append(segment)
        n_chars -= len(segment.text)
    return before, []
