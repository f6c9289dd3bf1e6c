"""The answer of a reply, as Markdown that grows."""

from __future__ import annotations

import re

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from textual.content import Content
from textual.widgets import Markdown
from textual.widgets.markdown import MarkdownFence

from nanorun.tui.text import printable

# A definition changes blocks above it, which appending does not touch.
_LINK_DEFINITION = re.compile(r"^ {0,3}\[[^\]]+\]:", re.MULTILINE)


class CodeBlock(MarkdownFence):
    """Code with its colours; without a language it has none."""

    @classmethod
    def highlight(cls, code: str, language: str, ansi: bool = False, dark: bool = False) -> Content:
        """Colour the code.

        Textual guesses a missing language from the code, anew with every line that arrives, and
        knows none called `python title="x"`.
        """
        name = language.split()[0] if language.strip() else "text"
        return super().highlight(code, name, ansi=ansi, dark=dark)


class Answer(Markdown):
    """Markdown fed a fragment at a time."""

    DEFAULT_CSS = """
    Answer {
        padding: 0;
        margin: 0 2;
        & > MarkdownH1, & > MarkdownH2 { margin: 0 0 1 0; content-align: left middle; }
        & > MarkdownFence { margin: 0 0 1 0; & > Label { padding: 0 1; } }
    }
    """

    BLOCKS = Markdown.BLOCKS | {"fence": CodeBlock, "code_block": CodeBlock}

    def __init__(self) -> None:
        # One parser a widget: building it costs more than parsing a paragraph, and its linkifier
        # keeps state, so two widgets must not share it.
        parser = _chat_parser()
        super().__init__(parser_factory=lambda: parser)

    async def append_fragment(self, text: str) -> None:
        """Add Markdown at the end; not to be called again before it returns."""
        await self.append(printable(text))

    async def finish(self) -> None:
        """Make all that was appended look as if it had come at once."""
        if _LINK_DEFINITION.search(self.source):
            await self.update(self.source)


def _chat_parser() -> MarkdownIt:
    """GitHub's Markdown as chats use it: HTML is text, and a line end is one.

    Textual drops HTML tokens, so an answer about `<div>` would lose words.
    """
    parser = MarkdownIt("gfm-like", {"html": False})
    parser.core.ruler.push("line_ends", _keep_line_ends)
    return parser


def _keep_line_ends(state: StateCore) -> None:
    for token in state.tokens:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
