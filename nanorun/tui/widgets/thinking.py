"""The thinking of a reply: folded, timed, and there to be read."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.reactive import reactive
from textual.widgets import Static

from nanorun.tui.text import printable, seconds_label

# Text in one widget is wrapped anew with each fragment, so long thinking is cut into pages of
# which only the last one still changes.
_PAGE_CHARS = 2_000
# The end of a line of thinking beside the timer; more than a terminal is wide.
_PREVIEW_CHARS = 300


class ThinkingHeader(Static, can_focus=True):
    """The line that says how long it thinks, and folds and unfolds what it thought."""

    DEFAULT_CSS = """
    ThinkingHeader {
        width: 1fr;
        height: 1;
        color: $text-muted;
        text-wrap: nowrap;
        text-overflow: ellipsis;
        &:hover { color: $text; }
        &:focus { color: $text-accent; }
    }
    """

    FOCUS_ON_CLICK = False
    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter,space", "fold", show=False)]

    def action_fold(self) -> None:
        """Fold or unfold."""
        assert isinstance(self.parent, Thinking)
        self.parent.is_open = not self.parent.is_open

    def on_click(self) -> None:
        """Fold or unfold."""
        self.action_fold()


class Thinking(Vertical):
    """What the model thought, as plain text under a header."""

    DEFAULT_CSS = """
    Thinking {
        height: auto;
        display: none;
        margin: 0 2 1 2;
        & > .pages {
            display: none;
            height: auto;
            padding: 0 1;
            border-left: vkey $surface-lighten-2;
            color: $text-muted;
        }
        &.-begun { display: block; }
        &.-open > .pages { display: block; }
    }
    """

    is_open: reactive[bool] = reactive(False, init=False)

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self._page_starts: list[int] = []
        self._n_rendered = 0
        self._seconds = 0.0
        self._is_over = False

    def compose(self) -> ComposeResult:
        """A header and room for pages."""
        yield ThinkingHeader()
        yield Vertical(classes="pages")

    def append_fragment(self, text: str) -> None:
        """Add thinking; it is rendered only while someone looks."""
        self.add_class("-begun")
        self.text += printable(text)
        if self.is_open:
            self._render_pages()

    def show_time(self, seconds: float, *, is_over: bool) -> None:
        """Say how long it has thought, or thought in all."""
        self._seconds, self._is_over = seconds, is_over
        self._render_header()

    def watch_is_open(self, is_open: bool) -> None:
        """Fold or unfold."""
        self.set_class(is_open, "-open")
        self._render_header()
        if is_open:
            self._render_pages()

    def _render_header(self) -> None:
        arrow, time = "▾" if self.is_open else "▸", seconds_label(self._seconds)
        line = Content(
            f"{arrow} thought for {time}" if self._is_over else f"{arrow} thinking… {time}"
        )
        if not self._is_over and not self.is_open:
            line += Content.styled(f"  {self._last_line()}", "dim")
        self.query_one(ThinkingHeader).update(line)

    def _last_line(self) -> str:
        return self.text[-_PREVIEW_CHARS:].rstrip().rpartition("\n")[2].strip()

    def _render_pages(self) -> None:
        if self._n_rendered == len(self.text):
            return
        self._n_rendered = len(self.text)
        pages = self.query_one(".pages", Vertical)
        starts = _page_starts(self.text, self._page_starts)
        if self._page_starts:
            last = len(self._page_starts) - 1
            shown = pages.children[last]
            assert isinstance(shown, Static)
            shown.update(self._page(starts, last))
        new = range(len(self._page_starts), len(starts))
        pages.mount_all(Static(self._page(starts, i), markup=False) for i in new)
        self._page_starts = starts

    def _page(self, starts: list[int], i: int) -> str:
        end = starts[i + 1] if i + 1 < len(starts) else len(self.text)
        # The newline between two pages is the border between their widgets.
        return self.text[starts[i] : end].removesuffix("\n")


def _page_starts(text: str, known: list[int]) -> list[int]:
    """Where pages begin: at line starts, `_PAGE_CHARS` or more apart; `known` ones stay."""
    starts = list(known) or [0]
    while (newline := text.find("\n", starts[-1] + _PAGE_CHARS)) >= 0:
        starts.append(newline + 1)
    return starts
