"""The conversation, as it scrolls."""

from __future__ import annotations

from textual import events
from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.widget import Widget
from textual.widgets import Static

from nanorun.tui.widgets.turn import Turn


class Transcript(VerticalScroll, can_focus=False):
    """Turns and notices. It follows its end until the person scrolls away from it."""

    # An anchored container scrolls to minus so many rows where its content is too short to fill
    # it; entries that are never shorter than the container keep short conversations at the top.
    DEFAULT_CSS = """
    Transcript {
        height: 1fr;
        scrollbar-size-vertical: 1;
        scrollbar-color: $surface-lighten-2;
        scrollbar-background: $background;
        scrollbar-background-hover: $background;
        & > .entries { height: auto; min-height: 100%; padding: 1 1 0 1; }
    }
    """

    _width = 0

    def compose(self) -> ComposeResult:
        """The welcome, which entries take the place of."""
        with Vertical(classes="entries"):
            yield Welcome()

    async def add(self, widget: Widget) -> None:
        """Put a widget at the end, and go there."""
        await self._entries.mount(widget)
        self.follow()
        self.call_after_refresh(self._send_away)

    def follow(self) -> None:
        """Go to the end and stay there as it grows."""
        self.anchor()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Bring in what comes near."""
        super().watch_scroll_y(old_value, new_value)
        self.call_after_refresh(self._send_away)

    def on_resize(self, event: events.Resize) -> None:
        """Measure all turns anew where their lines may break elsewhere."""
        if event.size.width != self._width:
            self._width = event.size.width
            for turn in self.turns:
                turn.set_away(False)
        self.call_after_refresh(self._send_away)

    def _send_away(self) -> None:
        """Keep the turns on the screen and a page around it in the layout, and no others."""
        page = self.container_size.height
        top = 0
        for turn in self.turns:
            bottom = top + turn.height_rows
            is_near = bottom >= self.scroll_y - page and top <= self.scroll_y + 2 * page
            turn.set_away(not is_near)
            top = bottom

    async def clear(self) -> None:
        """Take everything out but the welcome."""
        entries = self._entries
        await entries.remove_children([e for e in entries.children if not isinstance(e, Welcome)])

    @property
    def turns(self) -> list[Turn]:
        """The turns, oldest first."""
        return [entry for entry in self._entries.children if isinstance(entry, Turn)]

    @property
    def _entries(self) -> Vertical:
        return self.query_one(".entries", Vertical)


class Welcome(Static):
    """What an empty conversation shows."""

    DEFAULT_CSS = """
    Welcome { margin: 1 2; color: $text-muted; }
    """
