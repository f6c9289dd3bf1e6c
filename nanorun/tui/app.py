"""The terminal chat as an application: theme, screen, command palette, and the client's end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.theme import Theme

from nanorun.model.chat import GenerateOptions
from nanorun.tui.commands import COMMANDS
from nanorun.tui.screens.chat import ChatScreen
from nanorun.tui.signals import leaving_on_signals

if TYPE_CHECKING:
    from nanorun.runtime.protocol import Client

THEME = Theme(
    name="nanorun",
    primary="#76b900",
    secondary="#5a8f00",
    accent="#8fd0ff",
    foreground="#e4e6e0",
    background="#121412",
    surface="#1b1e1b",
    panel="#242824",
    success="#76b900",
    warning="#e8b64c",
    error="#f06a5d",
    dark=True,
)


_LOOK_FOR_TERMINAL_S = 2.0


class NanorunApp(App[None]):
    """Chat with one model.

    Args:
        client: Answers. The app starts it and closes it.
        model_name: What to call the model; by default its own name, once it is loaded.
        options: How to answer; `think` is where the reasoning dial stands at first.
        endpoint: What the client talks to, if that is not an engine on this machine.
        memory: What the engine was planned to take and takes, for the person to see.
    """

    CSS_PATH = "app.tcss"
    TITLE = "nanorun"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+q", "quit", "Quit", tooltip="Leave the chat", priority=True)
    ]

    def __init__(
        self,
        client: Client,
        *,
        model_name: str = "",
        options: GenerateOptions | None = None,
        endpoint: str = "",
        memory: Callable[[], str | None] = lambda: None,
    ) -> None:
        super().__init__()
        self._client = client
        self._model_name = model_name
        self._options = options or GenerateOptions()
        self._endpoint = endpoint
        self._memory = memory

    async def run_async(self, **options: Any) -> None:
        """Run until the person, or a signal that ends processes, says to leave.

        Args:
            options: As `App.run_async` takes them.
        """
        with leaving_on_signals(lambda code: self.exit(return_code=code)):
            await super().run_async(**options)

    def on_mount(self) -> None:
        """Dress the app."""
        self.register_theme(THEME)
        self.theme = THEME.name
        if not self.is_headless and os.name == "posix":
            self.set_interval(_LOOK_FOR_TERMINAL_S, self._leave_with_terminal)

    def _leave_with_terminal(self) -> None:
        """Exit when the terminal was closed.

        Its hang-up signal reaches the session's leader alone, which may be `make` or a script; an
        app that stayed would read the end of its input for ever.
        """
        import termios

        try:
            termios.tcgetattr(0)
        except termios.error:
            self.exit()

    def get_default_screen(self) -> Screen[None]:
        """The chat."""
        return ChatScreen(
            self._client,
            model_name=self._model_name,
            options=self._options,
            endpoint=self._endpoint,
            memory=self._memory,
        )

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """The chat's commands, as far as they apply now, before Textual's own."""
        if isinstance(screen, ChatScreen):
            for command in COMMANDS:
                if screen.check_action(command.action, ()):
                    run = partial(screen.run_action, command.action)
                    yield SystemCommand(command.title, command.help, run)
        yield from super().get_system_commands(screen)

    def action_help_quit(self) -> None:
        """Ctrl+C: stop the running reply; without one, say how to quit."""
        if isinstance(self.screen, ChatScreen) and self.screen.turn is not None:
            self.screen.call_next(self.screen.action_stop)
        else:
            super().action_help_quit()

    async def on_unmount(self) -> None:
        """End the engine with the app."""
        await self._client.close()
