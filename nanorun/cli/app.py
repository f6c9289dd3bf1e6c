"""The command tree: which commands there are, and how their flags are read.

Commands are named here and imported when they are asked for; a module `nanorun.cli.commands.NAME`
holds one function, `command`, whose signature is its flags. Typer's own complaints leave as
`UsageError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command as build_typer

from nanorun import __version__
from nanorun.cli.diagnostics import talk, write_data
from nanorun.errors import ExitCode, UsageError

COMMANDS = {
    "chat": "Chat with a model in the terminal.",
    "run": "Print one answer; reads and feeds pipes.",
    "serve": "Answer over HTTP, in the words of OpenAI, Anthropic and Ollama.",
    "convert": "Turn a source model (safetensors) into a quantized GGUF.",
    "plan": "Show what a model takes on a machine, before any download.",
    "inspect": "Show what is in a GGUF file or a source model.",
    "eval": "Measure a model's perplexity on a text.",
    "doctor": "Show what this machine has, and what is wrong with it.",
    "imatrix": "Collect a model's importance matrix on a text.",
    "quantize-stats": "Show what a recipe's types lose on a source model.",
}
"""Command to the first line of its help, in the order of `nanorun --help`."""

_REST = "Options"
"""The group of flags that name none, `--help` among them."""

_CONTEXT_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


def invoke(args: Sequence[str]) -> int:
    """Run one command line.

    Returns:
        The exit code that the command asks for.

    Raises:
        UsageError: If the command line makes no sense.
        NanorunError: Whatever the command raises.
    """
    group: Any = build_typer(_app())
    try:
        with group.make_context("nanorun", list(args)) as context:
            return int(group.invoke(context) or ExitCode.OK)
    except typer.Exit as stop:
        return stop.exit_code
    except typer.TyperException as error:
        raise _as_usage_error(error) from error


def _app() -> typer.Typer:
    app = typer.Typer(
        cls=_Commands,
        add_completion=False,
        rich_markup_mode=None,
        context_settings=_CONTEXT_SETTINGS,
        invoke_without_command=True,
        help="Run NVIDIA Nemotron 3 Nano on this machine: convert, chat, serve.",
        epilog="MODEL is a library name (pico) or the path of a GGUF file.",
    )
    app.callback()(_root)
    return app


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        write_data(f"nanorun {__version__}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        talk(context.get_help() + "\n")
        raise typer.Exit(ExitCode.USAGE)


def _show_help(ctx: Any, _param: Any, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        write_data(ctx.get_help() + "\n")
        ctx.exit()


class _HelpAsData:
    """A command whose help is written as all data is: Typer's own fails on a full disk."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.callback = _show_help
        return option


class _Commands(_HelpAsData, TyperGroup):
    """The root: knows every command's name and line of help, imports the one that runs."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name in COMMANDS:
            return name, self.get_command(ctx, name), args[1:]
        near = get_close_matches(name, COMMANDS, n=1)
        raise UsageError(
            f"there is no command {name!r}",
            facts=[f"commands: {', '.join(COMMANDS)}"],
            tries=[f"nanorun {near[0]} --help" if near else "nanorun --help"],
        )


class _Command(_HelpAsData, TyperCommand):
    """A command whose help shows its flags in the groups named by `rich_help_panel`."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        # Typer marks what is required with braces; here only what may be left out is marked.
        return [
            piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)
        ]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                # An argument's name comes with its type (`MODEL <str>`), which says nothing here.
                name = record[0].partition(" <")[0]
                groups.setdefault(_group_of(param), []).append((name, record[1]))
        rest = groups.pop(_REST)
        for title, records in [*groups.items(), (_REST, rest)]:
            with formatter.section(title):
                formatter.write_dl(records)


def _group_of(param: Any) -> str:
    if param.param_type_name == "argument":
        return "Arguments"
    return getattr(param, "rich_help_panel", None) or _REST


def load_command(name: str) -> Any:
    """Import one command's module and read its flags."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    module = import_module(f"nanorun.cli.commands.{name.replace('-', '_')}")
    app.command(name, cls=_Command, context_settings=_CONTEXT_SETTINGS)(module.command)
    return build_typer(app)


def _as_usage_error(error: typer.TyperException) -> UsageError:
    """Typer's complaint in the contract's words: what, the usage, the command that helps."""
    message = error.format_message().strip().rstrip(".").replace("': Input", "': input")
    context: Any = getattr(error, "ctx", None)
    if context is None:
        return UsageError(_lower_first(message), tries=["nanorun --help"])
    usage = " ".join(context.get_usage().split())
    return UsageError(
        _lower_first(message),
        facts=[_lower_first(usage)],
        tries=[f"{context.command_path} --help"],
    )


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
