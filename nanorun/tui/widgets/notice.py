"""Lines in the transcript that neither side of the conversation said."""

from __future__ import annotations

from textual.content import Content
from textual.widgets import Static

from nanorun.errors import NanorunError
from nanorun.tui.text import printable


class NoticeLine(Static):
    """Something the person should know."""

    DEFAULT_CSS = """
    NoticeLine { color: $text-warning; margin: 0 2 1 2; }
    """

    def __init__(self, text: str) -> None:
        super().__init__(f"· {printable(text)}", markup=False)


class ErrorPanel(Static):
    """An error with its facts and what to try."""

    DEFAULT_CSS = """
    ErrorPanel {
        margin: 0 2 1 2;
        padding: 0 1;
        border-left: thick $error;
        background: $error 8%;
    }
    """

    def __init__(self, error: NanorunError) -> None:
        self.error = error
        super().__init__(_error_content(error))


def _error_content(error: NanorunError) -> Content:
    lines = [Content.styled(printable(error.message), "bold $text-error")]
    lines += [Content.styled(printable(fact), "dim") for fact in error.facts]
    for i, command in enumerate(error.tries):
        label = Content.styled("try: " if i == 0 else "     ", "dim")
        lines.append(label + Content(printable(command)))
    return Content("\n").join(lines)
