"""One line: model, state, reasoning dial, context, speed."""

from __future__ import annotations

from math import ceil

from textual.content import Content
from textual.reactive import reactive
from textual.style import Style
from textual.widget import Widget

from nanorun.model.think import LEVELS, MEDIUM, Think
from nanorun.tui.text import count_label, printable

_N_METER_CELLS = 10
_LEVELS = tuple(LEVELS)


class StatusBar(Widget):
    """The state of the chat. What does not fit goes from the right end of the left side first."""

    DEFAULT_CSS = """
    StatusBar {
        height: 1;
        padding: 0 1;
        background: $surface;
        color: $text-muted;
    }
    """

    model: reactive[str] = reactive("")
    state: reactive[str] = reactive("")
    state_style: reactive[str] = reactive("$text-muted")
    think: reactive[Think] = reactive(MEDIUM)
    n_used: reactive[int] = reactive(0)
    n_ctx: reactive[int] = reactive(0)
    tps: reactive[float | None] = reactive(None)

    def render(self) -> Content:
        """Left: model and state. Right: dial, context, speed; the speed goes first if it must."""
        left = Content.assemble(
            (printable(self.model), "bold $text"), "  ", (printable(self.state), self.state_style)
        )
        parts = [self._dial_part(), self._context_part(), self._speed_part()]
        while parts:
            right = Content("   ").join([part for part in parts if part])
            gap = self.content_size.width - left.cell_length - right.cell_length
            if gap >= 2:
                return left + Content(" " * gap) + right
            parts.pop()
        return left

    def _dial_part(self) -> Content:
        """The level as a bar and a word; a click turns it."""
        if self.think.level is not None:
            n_lit = _LEVELS.index(self.think.level)
            bar = Content.styled("▮" * n_lit, "$text-primary") + Content.styled(
                "▯" * (len(_LEVELS) - 1 - n_lit), "dim"
            )
            dial = Content.assemble("reasoning ", bar, f" {self.think}")
        else:
            dial = Content(f"reasoning {count_label(self.think.budget or 0)} tokens")
        return dial.stylize(Style.from_meta({"@click": "screen.next_think"}))

    def _context_part(self) -> Content:
        if not self.n_ctx:
            return Content()
        share = min(self.n_used / self.n_ctx, 1.0)
        n_lit = ceil(share * _N_METER_CELLS)
        colour = (
            "$text-error" if share > 0.95 else "$text-warning" if share > 0.8 else "$text-primary"
        )
        return Content.assemble(
            f"{count_label(self.n_used)} / {count_label(self.n_ctx)} ",
            ("━" * n_lit, colour),
            ("━" * (_N_METER_CELLS - n_lit), "$surface-lighten-3"),
        )

    def _speed_part(self) -> Content:
        return Content(f"{self.tps:.1f} t/s") if self.tps is not None else Content()
