"""Where a question is written."""

from __future__ import annotations

from dataclasses import dataclass

from textual import events
from textual.message import Message
from textual.widgets import TextArea

# Terminals without the Kitty protocol send Shift+Enter as Enter; Ctrl+J and Alt+Enter arrive from
# all of them.
_NEWLINE_KEYS = ("shift+enter", "ctrl+j", "alt+enter")


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
    }
    """

    ALLOW_MAXIMIZE = False

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

    async def _on_key(self, event: events.Key) -> None:
        """Send, or start a line.

        Not by bindings: those run in the app's queue, so Enter would overtake letters that were
        typed quickly or pasted, and send the text without them.
        """
        if event.key != "enter" and event.key not in _NEWLINE_KEYS:
            return
        event.stop()
        event.prevent_default()
        if event.key == "enter":
            self.send()
        else:
            self.replace("\n", *self.selection)
            self.scroll_cursor_visible()

    def send(self) -> None:
        """Hand the text to the screen; letters that come after it belong to the next one."""
        if self.text.strip():
            self.post_message(self.Submitted(self, self.text))
            self.clear()

    def take_back(self, text: str) -> None:
        """Put a text back that was sent too early, before what was written since."""
        self.insert(f"{text}\n" if self.text else text, (0, 0))
        self.move_cursor(self.document.end)

    def give_back(self, text: str) -> None:
        """Offer a text again, selected: Enter sends it and typing replaces it.

        A draft that was begun in the meantime stays.
        """
        if not self.text:
            self.load_text(text)
            self.select_all()
