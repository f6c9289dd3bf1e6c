from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nanorun import __version__
from nanorun.cli.app import COMMANDS, load_command
from tests.cli.conftest import FakeEngine, Result

Run = Callable[..., Result]
GOLDEN = Path(__file__).parent.parent / "golden" / "help"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_as_recorded(nanorun: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """NANORUN_UPDATE_GOLDEN=1 records it anew."""
    monkeypatch.setenv("COLUMNS", "80")
    result = nanorun(*command.split(), "--help")
    assert (result.code, result.err) == (0, "")
    path = GOLDEN / f"{command or 'nanorun'}.txt"
    if os.environ.get("NANORUN_UPDATE_GOLDEN"):
        path.write_text(result.out)
    assert result.out == path.read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_begins_as_the_list_says(command: str) -> None:
    assert load_command(command).help.splitlines()[0] == COMMANDS[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_marks_what_may_be_left_out_and_says_each_default_once(
    nanorun: Run, command: str
) -> None:
    text = " ".join(nanorun(command, "--help").out.split())
    assert "{" not in text.partition("Options:")[0] and "}" not in text.partition("Options:")[0]
    for entry in text.split(" --"):
        assert entry.count("[default:") <= 1


def test_help_is_printed_for_h_too(nanorun: Run) -> None:
    assert nanorun("run", "-h") == nanorun("run", "--help")


def test_version_is_data(nanorun: Run) -> None:
    assert nanorun("--version") == Result(0, f"nanorun {__version__}\n", "")


def test_command_line_without_a_command_shows_help_on_stderr(nanorun: Run) -> None:
    result = nanorun()
    assert (result.code, result.out) == (2, "")
    assert result.err == nanorun("--help").out


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (
            ["rum", "pico"],
            "nanorun: error: there is no command 'rum'\n"
            f"  commands: {', '.join(COMMANDS)}\n"
            "  try: nanorun run --help\n",
        ),
        (
            ["run"],
            "nanorun: error: missing argument 'MODEL'\n"
            "  usage: nanorun run [OPTIONS] [MODEL] [PROMPT] [-]\n"
            "  try: nanorun run --help\n",
        ),
        (
            ["serve", "--port", "http"],
            "nanorun: error: invalid value for '--port': input should be a valid integer, unable"
            " to parse string as an integer\n"
            "  usage: nanorun serve [OPTIONS] [MODEL]\n"
            "  try: nanorun serve --help\n",
        ),
        (
            ["--nonsense"],
            "nanorun: error: no such option: --nonsense\n"
            "  usage: nanorun [OPTIONS] COMMAND [ARGS]...\n"
            "  try: nanorun --help\n",
        ),
    ],
)
def test_command_line_that_makes_no_sense_is_a_usage_error(
    nanorun: Run, args: list[str], error: str
) -> None:
    assert nanorun(*args) == Result(2, "", error)


def test_chat_without_a_terminal_offers_run(nanorun: Run, engine: FakeEngine) -> None:
    result = nanorun("chat")
    assert result.code == 2
    assert "chat needs a terminal" in result.err
    assert "try: nanorun run pico " in result.err


def test_model_unknown_to_the_library_is_a_usage_error(nanorun: Run) -> None:
    result = nanorun("run", "pica", "x")
    assert result.code == 2
    assert "'pica'" in result.err
