"""The chat: one conversation with one model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from textual import events, on, work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.content import Content
from textual.reactive import reactive
from textual.screen import Screen
from textual.widgets import Footer

from nanorun.errors import EngineDied, EngineError, NanorunError
from nanorun.model.chat import GenerateOptions, Message, ModelInfo
from nanorun.model.think import LEVELS, MEDIUM, Think
from nanorun.model.units import format_gib
from nanorun.tui.commands import BINDINGS
from nanorun.tui.messages import EngineFailed, EngineReady, ReplyEnded
from nanorun.tui.reply import Phase, Reply
from nanorun.tui.text import count_label, params_label, printable, seconds_label
from nanorun.tui.widgets.composer import Composer
from nanorun.tui.widgets.notice import ErrorPanel
from nanorun.tui.widgets.status_bar import StatusBar
from nanorun.tui.widgets.transcript import Transcript, Welcome
from nanorun.tui.widgets.turn import Turn

if TYPE_CHECKING:
    from nanorun.runtime.protocol import Client, Generation

_log = logging.getLogger(__name__)

_LEVELS = tuple(LEVELS)
_LOADING_TICK_S = 0.25


class ChatScreen(Screen[None]):
    """Composer, transcript and status, and the two workers that talk to the client.

    `messages` is the conversation as the model sees it. A question that failed or was stopped
    before it was answered leaves it again, and comes back to the composer.
    """

    BINDINGS: ClassVar[list[BindingType]] = [*BINDINGS]

    think: reactive[Think] = reactive(MEDIUM, init=False)

    def __init__(
        self,
        client: Client,
        *,
        model_name: str,
        options: GenerateOptions,
        endpoint: str = "",
        memory: Callable[[], str | None] = lambda: None,
    ) -> None:
        super().__init__()
        self.messages: list[Message] = []
        self.turn: Turn | None = None
        """The turn whose reply is awaited."""
        self._client = client
        self._model_name = model_name
        self._options = options
        self._endpoint = endpoint
        self._memory = memory
        self._info: ModelInfo | None = None
        self._generation: Generation | None = None
        self._is_stopping = False
        self._engine_is_down = False
        self._loading_since = 0.0
        self._phase_of_keys: Phase | None = None
        self.set_reactive(ChatScreen.think, options.think)

    # ---- widgets ----

    def compose(self) -> ComposeResult:
        """Transcript, composer, status, keys."""
        yield Transcript()
        yield Composer()
        yield StatusBar()
        yield Footer()

    @property
    def transcript(self) -> Transcript:
        """The conversation on screen."""
        return self.query_one(Transcript)

    @property
    def composer(self) -> Composer:
        """Where questions are written."""
        return self.query_one(Composer)

    @property
    def status(self) -> StatusBar:
        """The status line."""
        return self.query_one(StatusBar)

    def on_mount(self) -> None:
        """Begin to load the model; the composer is usable meanwhile."""
        self.status.model = self._model_name or self._endpoint
        self.status.think = self.think
        self.query_one(Welcome).update(self._welcome())
        self.composer.focus()
        self._loading_timer = self.set_interval(_LOADING_TICK_S, self._show_loading, pause=True)
        self._load()

    def on_key(self, event: events.Key) -> None:
        """Typing goes to the composer wherever the focus is."""
        if event.is_printable and event.character and self.focused is not self.composer:
            self.composer.focus()
            self.composer.insert(event.character)
            event.stop()

    # ---- the model ----

    def _load(self) -> None:
        self._loading_since = time.monotonic()
        self._loading_timer.resume()
        self._show_loading()
        self._start_client()

    @work(exclusive=True, exit_on_error=False, group="load")
    async def _start_client(self) -> None:
        try:
            info = await self._client.start()
        except NanorunError as error:
            self.post_message(EngineFailed(error))
        except Exception as error:
            _log.exception("loading the model failed")
            self.post_message(EngineFailed(_internal_error(error)))
        else:
            self.post_message(EngineReady(info))

    @property
    def _is_loading(self) -> bool:
        return any(worker.group == "load" and not worker.is_finished for worker in self.workers)

    @on(EngineReady)
    def _on_engine_ready(self, event: EngineReady) -> None:
        self._loading_timer.pause()
        self._info = event.info
        name = self._model_name or event.info.name
        self.status.model = f"{name} at {self._endpoint}" if self._endpoint else name
        self.status.n_ctx = event.info.n_ctx
        self.query_one(Welcome).update(self._welcome())
        self._show_ready()
        if self.turn is not None:
            self._generate(self.turn)

    @on(EngineFailed)
    async def _on_engine_failed(self, event: EngineFailed) -> None:
        self._loading_timer.pause()
        state = "not reached" if self._endpoint else "not loaded"
        self._show_state(state, "$text-error")
        if self.turn is None:
            await self.transcript.add(ErrorPanel(event.error))
        else:
            self.post_message(ReplyEnded(self.turn, event.error))

    def _welcome(self) -> Content:
        lines = [Content.styled("nanorun", "bold $text-primary")]
        if self._info is not None:
            lines.append(Content(_model_facts(self._info, is_remote=bool(self._endpoint))))
            if memory := self._memory():
                lines.append(Content(f"memory: {memory}"))
        lines.append(
            Content("Ask something. Ctrl+R sets how long it may think, Ctrl+P shows all commands.")
        )
        return Content("\n").join(lines)

    # ---- questions ----

    @on(Composer.Submitted)
    async def _on_submitted(self, event: Composer.Submitted) -> None:
        if self.turn is not None:
            event.composer.take_back(event.text)
            self.notify("the last question is still being answered: Escape stops it", timeout=4)
            return
        await self._ask(event.text.strip())

    async def _ask(self, question: str) -> None:
        is_ready = self._info is not None
        turn = Turn(question, Reply(phase=Phase.WAITING if is_ready else Phase.QUEUED))
        self.turn = turn
        self._is_stopping = False
        self.messages.append(Message("user", question))
        self.query_one(Welcome).display = False
        await self.transcript.add(turn)
        self.refresh_bindings()
        if is_ready:
            self._generate(turn)
        elif not self._is_loading:
            self._load()

    @work(exclusive=True, exit_on_error=False, group="generate")
    async def _generate(self, turn: Turn) -> None:
        failure: NanorunError | None = None
        turn.reply.phase = Phase.WAITING
        options = replace(self._options, think=self.think)
        generation: Generation | None = None
        try:
            generation = self._generation = self._client.generate(tuple(self.messages), options)
            async for event in generation:
                turn.feed(event)
        except NanorunError as error:
            failure = error
        except Exception as error:
            _log.exception("a reply failed")
            failure = _internal_error(error)
        finally:
            if self._generation is generation:
                self._generation = None
            self.post_message(ReplyEnded(turn, failure))

    @on(Turn.Progressed)
    def _on_progressed(self, event: Turn.Progressed) -> None:
        if event.turn is not self.turn:
            return
        reply = event.turn.reply
        if reply.n_used:
            self._engine_is_down = False
            self.status.n_used, self.status.tps = reply.n_used, reply.tps
        if reply.phase is not Phase.QUEUED:
            self._show_state(self._running_state(reply.phase), "$text-accent")
        if reply.phase is not self._phase_of_keys:
            # The footer is built anew for this, so not with every fragment.
            self._phase_of_keys = reply.phase
            self.refresh_bindings()

    def _running_state(self, phase: Phase) -> str:
        if self._is_stopping:
            return "stopping"
        if phase is Phase.WAITING and self._engine_is_down:
            return "asking the endpoint again" if self._endpoint else "restarting the engine"
        return str(phase)

    @on(ReplyEnded)
    async def _on_reply_ended(self, event: ReplyEnded) -> None:
        turn, reply = event.turn, event.turn.reply
        if turn is not self.turn:
            return
        self.turn = None
        is_kept = event.error is None and reply.has_answer
        if is_kept:
            self.messages.append(reply.message())
        else:
            self.messages.pop()
        await turn.finish(event.error)
        if not is_kept:
            self.composer.give_back(turn.question)
        self._engine_is_down = isinstance(event.error, EngineDied)
        if self._info is not None:
            self._show_ready()
            self.status.n_used = reply.n_used or self.status.n_used
            self.status.tps = reply.tps
        self.refresh_bindings()

    # ---- commands ----

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer only what can be done now."""
        match action:
            case "stop":
                return self.turn is not None
            case "answer_now":
                return self.turn is not None and self.turn.reply.phase is Phase.THINKING
        return True

    async def action_stop(self) -> None:
        """End the running reply; a second time, without waiting for the engine to say so."""
        if self.turn is None:
            return
        is_begun = self.turn.reply.phase not in (Phase.QUEUED, Phase.WAITING)
        if is_begun and self._generation is not None and not self._is_stopping:
            self._is_stopping = True
            await self._generation.cancel()
        else:
            self._abandon_reply()

    def _abandon_reply(self) -> None:
        """Stop listening; the client cancels what it had asked the engine for."""
        self.workers.cancel_group(self, "generate")
        # A worker that had not begun yet does not say that it ended.
        if self.turn is not None:
            self.post_message(ReplyEnded(self.turn))

    async def action_answer_now(self) -> None:
        """End the thinking of the running reply."""
        if self._generation is not None:
            await self._generation.finish_thinking()

    def action_next_think(self) -> None:
        """Turn the reasoning dial to its next level, from the last to the first."""
        level = self.think.level
        i_next = 0 if level is None else _LEVELS.index(level) + 1
        self.think = Think.parse(_LEVELS[i_next % len(_LEVELS)])

    def action_set_think(self, level: str) -> None:
        """Set the reasoning dial."""
        self.think = Think.parse(level)

    async def watch_think(self, think: Think) -> None:
        """Show the level, and hold a reply that is thinking to it."""
        self.status.think = think
        if self._generation is not None:
            await self._generation.set_budget(think.budget)

    def action_toggle_thinking(self) -> None:
        """Fold or unfold the latest thinking."""
        for turn in reversed(self.transcript.turns):
            if turn.reply.thinking:
                turn.thinking.is_open = not turn.thinking.is_open
                return

    def action_copy_answer(self) -> None:
        """Copy the latest answer, as far as it got."""
        for turn in reversed(self.transcript.turns):
            if turn.reply.answer:
                self.app.copy_to_clipboard(turn.reply.answer)
                self.notify(f"copied {len(turn.reply.answer):,} characters", timeout=3)
                return
        self.notify("there is no answer to copy yet", timeout=3)

    def action_new_conversation(self) -> None:
        """Start over."""
        # Among the screen's messages, so that no reply ends in the middle of it.
        self.call_next(self._start_over)

    async def _start_over(self) -> None:
        if self.turn is not None:
            turn, self.turn = self.turn, None
            self._abandon_reply()
            await turn.finish()
        self.messages.clear()
        await self.transcript.clear()
        self.query_one(Welcome).display = True
        self.status.n_used, self.status.tps = 0, None
        if self._info is not None:
            self._show_ready()
        self.composer.focus()
        self.refresh_bindings()

    def action_scroll_transcript(self, direction: int) -> None:
        """Look a page up (-1) or down (1)."""
        if direction < 0:
            self.transcript.scroll_page_up(animate=False)
        else:
            self.transcript.scroll_page_down(animate=False)

    def action_follow_end(self) -> None:
        """Go to the end and follow it."""
        self.transcript.follow()

    # ---- status ----

    def _show_state(self, state: str, style: str) -> None:
        self.status.state, self.status.state_style = state, style

    def _show_ready(self) -> None:
        if self._engine_is_down:
            state = "endpoint is gone" if self._endpoint else "engine restarts when asked"
            self._show_state(state, "$text-warning")
        else:
            self._show_state("ready", "$text-success")

    def _show_loading(self) -> None:
        seconds = time.monotonic() - self._loading_since
        what = f"connecting to {self._endpoint}" if self._endpoint else "loading the model"
        self._show_state(f"{what}, {seconds_label(seconds)}", "$text-accent")


def _model_facts(info: ModelInfo, *, is_remote: bool) -> str:
    """What was loaded or reached, in one line."""
    facts = [
        f"{params_label(info.n_params)} parameters" if info.n_params else "",
        info.recipe or "",
        format_gib(info.file_bytes) if info.file_bytes else "",
        f"{count_label(info.n_ctx)} tokens of context" if info.n_ctx else "",
        f"{'at' if is_remote else 'on'} {info.device}",
        f"{'reached' if is_remote else 'loaded'} in {seconds_label(info.load_s)}",
    ]
    return printable(" · ".join(fact for fact in facts if fact))


def _internal_error(error: Exception) -> NanorunError:
    """A bug, worded for the transcript; its traceback is in the log."""
    return EngineError(f"internal error: {type(error).__name__}: {error}")
