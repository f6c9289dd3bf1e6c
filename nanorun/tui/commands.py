"""What a person can do in the chat, declared once: key, footer and command palette follow."""

from __future__ import annotations

from dataclasses import dataclass

from textual.binding import Binding

from nanorun.model.think import LEVELS


@dataclass(frozen=True, slots=True)
class Command:
    """One thing to do in the chat."""

    action: str
    """Name of the screen's action."""
    title: str
    help: str
    key: str = ""
    label: str = ""
    """Word in the footer; empty keeps it out."""

    @property
    def binding(self) -> Binding:
        """The key. Priority, because the composer has the focus and keys of its own."""
        return Binding(
            self.key, self.action, self.label or self.title, show=bool(self.label), priority=True
        )


COMMANDS = (
    Command("stop", "Stop", "End the answer that is being written", "escape", "Stop"),
    Command("answer_now", "Answer now", "End the thinking and answer", "ctrl+g", "Answer now"),
    Command("next_think", "Reasoning: next level", "Think more, or not at all after the most",
            "ctrl+r", "Reasoning"),
    Command("toggle_thinking", "Fold or unfold thinking", "Show or hide what the model thought",
            "ctrl+t", "Thinking"),
    Command("copy_answer", "Copy the last answer", "Put its Markdown on the clipboard",
            "ctrl+o", "Copy"),
    Command("new_conversation", "New conversation", "Start over with an empty context",
            "ctrl+n", "New"),
    *(
        Command(f"set_think('{level}')", f"Reasoning: {level}", f"Set the dial to {level}")
        for level in LEVELS
    ),
)  # fmt: skip

BINDINGS = [
    *(command.binding for command in COMMANDS if command.key),
    # The composer has these keys too, but it is seldom longer than a page.
    Binding("pageup", "scroll_transcript(-1)", "Page up", show=False, priority=True),
    Binding("pagedown", "scroll_transcript(1)", "Page down", show=False, priority=True),
    Binding("ctrl+end", "follow_end", "Go to the end", show=False, priority=True),
]
