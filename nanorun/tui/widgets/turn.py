"""A question and its reply."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from textual import events
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Static

from nanorun.errors import NanorunError
from nanorun.model.chat import Event, Notice, ToolCallDelta
from nanorun.tui.reply import Phase, Reply
from nanorun.tui.text import printable
from nanorun.tui.widgets.answer import Answer
from nanorun.tui.widgets.notice import ErrorPanel, NoticeLine
from nanorun.tui.widgets.thinking import Thinking

# 25 times a second looks continuous, however fast tokens come.
_FLUSH_S = 0.04


class Turn(Vertical):
    """A question, and below it the thinking, the answer and the facts of its reply.

    Events change `reply` only; a timer brings the widgets up to date with it.
    """

    DEFAULT_CSS = """
    Turn {
        height: auto;
        max-width: 120;
        & > .question {
            margin: 0 0 1 0;
            padding: 0 1;
            border-left: thick $primary;
            background: $surface;
        }
        & > .facts { margin: 0 2 1 2; color: $text-disabled; }
        & > .facts.-empty { display: none; }
        &.-away > * { display: none !important; }
    }
    """

    @dataclass
    class Progressed(Message):
        """The reply has moved on; sent at most `1 / _FLUSH_S` times a second."""

        turn: Turn

    def __init__(self, question: str, reply: Reply) -> None:
        super().__init__()
        self.question = question
        self.reply = reply
        self._flushing = asyncio.Lock()
        self.height_rows = 0
        """Rows it takes on the screen."""

    def compose(self) -> ComposeResult:
        """Question, thinking, answer, facts."""
        yield Static(printable(self.question), markup=False, classes="question")
        yield Thinking()
        yield Answer()
        yield Static(self.reply.facts(), markup=False, classes="facts")

    def on_mount(self) -> None:
        """Keep up with the reply."""
        self.set_timer(_FLUSH_S, self._tick)

    def on_resize(self, event: events.Resize) -> None:
        """Remember the height, from which the transcript tells what is near."""
        self.height_rows = event.size.height

    def set_away(self, is_away: bool) -> None:
        """Take the parts out of the layout, or put them back; the height stays.

        Textual lays out all widgets of a screen anew for each change, seen or not, and a long
        conversation has thousands.
        """
        if is_away == self.has_class("-away") or self.reply.phase is not Phase.ENDED:
            return
        if is_away:
            # Not what the last Resize said: after a change of width, it may still be on its way.
            self.height_rows = self.size.height
        self.styles.height = self.height_rows if is_away else "auto"
        self.set_class(is_away, "-away")

    @property
    def thinking(self) -> Thinking:
        """The widget of the thinking."""
        return self.query_one(Thinking)

    @property
    def answer(self) -> Answer:
        """The widget of the answer."""
        return self.query_one(Answer)

    def feed(self, event: Event) -> None:
        """Take the next event of the reply."""
        self.reply.take(event)
        match event:
            case Notice(text):
                self._insert(NoticeLine(text))
            case ToolCallDelta(call=call, problem=problem):
                arguments = ", ".join(f"{key}={value!r}" for key, value in call.arguments.items())
                note = f" ({problem})" if problem else ""
                self._insert(NoticeLine(f"called {call.name}({arguments}){note}"))

    async def finish(self, error: NanorunError | None = None) -> None:
        """Show what is left, and the error it ended with, if any."""
        self.reply.end()
        await self._flush()
        await self.answer.finish()
        if error is not None:
            self.query_one(".facts").display = False
            self._insert(ErrorPanel(error))

    async def _tick(self) -> None:
        began = time.monotonic()
        await self._flush()
        if self.reply.phase is not Phase.ENDED:
            self.call_after_refresh(self._rest, began)

    def _rest(self, began: float) -> None:
        """Wait for as long as parsing, layout and painting took.

        A long answer takes longer to lay out, so this leaves half of the event loop to keys and
        to the reader of tokens. `MarkdownStream` would append again at once.
        """
        busy_s = time.monotonic() - began
        self.set_timer(max(_FLUSH_S - busy_s, busy_s), self._tick)

    async def _flush(self) -> None:
        async with self._flushing:
            if thinking := self.reply.take_thinking():
                self.thinking.append_fragment(thinking)
            if self.reply.thinking:
                is_over = self.reply.phase is not Phase.THINKING
                self.thinking.show_time(self.reply.thinking_s, is_over=is_over)
            if answer := self.reply.take_answer():
                await self.answer.append_fragment(answer)
            self._show_facts()
            self.post_message(self.Progressed(self))

    def _show_facts(self) -> None:
        facts = self.query_one(".facts", Static)
        facts.update(self.reply.facts())
        facts.set_class(not self.reply.facts(), "-empty")

    def _insert(self, widget: Widget) -> None:
        self.mount(widget, before=self.query_one(".facts"))
