"""Where a question is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea


class Composer(TextArea):
    """A text area that grows with its text; Enter sends it."""

    DEFAULT_CSS = """
    Composer {
        height: auto;
        max-height: 12;
        padding: 0 1;
        background: $background;
        border: round $surface-lighten-2;
        border-subtitle-color: $text-muted;
        &:focus { border: round $primary; }
        & .text-area--cursor-line { background: transparent; }
    }
    """

    ALLOW_MAXIMIZE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", "Send", show=False, priority=True),
        # Terminals without the Kitty protocol send Shift+Enter as Enter; Ctrl+J and Alt+Enter
        # arrive from all of them.
        Binding("shift+enter,ctrl+j,alt+enter", "newline", "New line", show=False, priority=True),
    ]

    @dataclass
    class Submitted(Message):
        """The person pressed Enter on a text."""

        composer: Composer
        text: str

        @property
        def control(self) -> Composer:
            """The composer it was written in."""
            return self.composer

    def __init__(self) -> None:
        super().__init__(
            soft_wrap=True,
            tab_behavior="focus",
            show_line_numbers=False,
            highlight_cursor_line=False,
            placeholder="Ask something",
        )
        self.border_subtitle = "Enter sends · Shift+Enter or Ctrl+J starts a line"

    def action_send(self) -> None:
        """Offer the text to the screen, which clears it if it takes it."""
        if self.text.strip():
            self.post_message(self.Submitted(self, self.text.strip()))

    def action_newline(self) -> None:
        """Start a new line."""
        self.replace("\n", *self.selection)
        self.scroll_cursor_visible()

    def give_back(self, text: str) -> None:
        """Offer a text again, selected: Enter sends it and typing replaces it.

        A draft that was begun in the meantime stays.
        """
        if not self.text:
            self.load_text(text)
            self.select_all()
