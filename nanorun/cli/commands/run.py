"""`nanorun run`: one answer on stdout, its thinking on stderr."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nanorun.cli import endpoints
from nanorun.cli import options as opt
from nanorun.cli.diagnostics import is_terminal, show_logs, write_data
from nanorun.cli.interrupts import Interrupts
from nanorun.cli.models import find_model
from nanorun.cli.planning import log_memory, parse_draft, plan_opening
from nanorun.cli.reply_output import JsonOutput, TextOutput
from nanorun.cli.standard_input import read_all, read_beside_prompt
from nanorun.errors import ExitCode, NanorunError, UsageError
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import Think

if TYPE_CHECKING:
    from nanorun.model.chat import GenerateOptions, Grammar, Message
    from nanorun.runtime.protocol import Client


def command(
    model: endpoints.ModelArgument = None,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="The question; `-`, or none: standard input is it."),
    ] = None,
    below: Annotated[
        str | None,
        typer.Argument(metavar="-", help="Wait for standard input and add it below PROMPT."),
    ] = None,
    think: opt.ThinkOption = "medium",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="N",
            min=1,
            help="Most tokens of the reply, thinking included.  [default: what fits]",
            rich_help_panel=opt.SAMPLING,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temp",
            metavar="T",
            min=0.0,
            help="Temperature; 0 takes the likeliest token.  [default: the model's]",
            rich_help_panel=opt.SAMPLING,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            metavar="P",
            min=0.0,
            max=1.0,
            help="Sample from the likeliest tokens that make up P.  [default: the model's]",
            rich_help_panel=opt.SAMPLING,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            min=0,
            help="Repeat the same choices.  [default: random]",
            rich_help_panel=opt.SAMPLING,
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system",
            metavar="TEXT",
            help="Instructions that come before the question.",
            rich_help_panel=opt.SAMPLING,
        ),
    ] = None,
    schema: Annotated[
        str | None,
        typer.Option(
            "--schema",
            metavar="FILE",
            help="Hold the answer to a JSON Schema: a file, or the schema itself.",
            rich_help_panel=opt.SAMPLING,
        ),
    ] = None,
    n_ctx: opt.NCtxOption = None,
    leave: opt.LeaveOption = None,
    draft: opt.DraftOption = "off",
    endpoint: endpoints.EndpointOption = None,
    as_json: opt.JsonOption = False,
    verbose: opt.VerboseOption = False,
) -> int:
    """Print one answer; reads and feeds pipes.

    The answer goes to standard output as it is written, the thinking to standard error. Ctrl-C
    stops the answer and keeps what was said; a second one leaves at once.

    Beside a PROMPT, standard input is added below it where it is a file that nobody has read from
    yet, or a pipe that brings something within 5 s. In `cat list | while read line`, the list is
    such a pipe: give `nanorun run` there `< /dev/null`. With `-` it is always read, to its end.

    With --endpoint, a single argument beside `-` is the PROMPT: the endpoint's only model answers.
    """
    from nanorun.model.chat import GenerateOptions

    write_data("")  # where nobody can get an answer, no model need be loaded
    if below not in (None, "-"):
        raise UsageError(
            f"got unexpected extra argument ({below})",
            facts=["only `-` may follow PROMPT"],
            tries=["nanorun run --help"],
        )
    if endpoint is not None and below is None and prompt in (None, "-"):
        model, prompt, below = None, model, prompt
    elif endpoint is None and model is None:
        raise UsageError(
            "missing argument 'MODEL'",
            facts=["usage: nanorun run [OPTIONS] [MODEL] [PROMPT] [-]"],
            tries=["nanorun run --help"],
        )
    question = read_prompt(prompt, waits=below is not None)
    request = GenerateOptions(
        think=Think.parse(think),
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        grammar=None if schema is None else read_schema(schema),
    )
    messages = to_messages(question, system)
    if verbose:
        show_logs(verbose=True)
    client, on_loaded = open_client(model, n_ctx, endpoint, draft, leave)
    interrupts = Interrupts()
    output = JsonOutput() if as_json else TextOutput()
    return interrupts.run(_answer(client, on_loaded, messages, request, output, interrupts))


def read_prompt(argument: str | None, *, waits: bool = False) -> str:
    """The question: the argument, standard input, or one above the other.

    Args:
        argument: PROMPT; None or `-` for standard input instead.
        waits: Whether standard input belongs to it, however long that takes.

    Raises:
        UsageError: If there is neither, or text that is not UTF-8.
    """
    parts: list[str] = []
    if argument is not None and argument != "-":
        parts.append(opt.check_text(argument, "the prompt"))
        data = read_all() if waits else read_beside_prompt()
    elif argument is None and is_terminal(sys.stdin):
        data = b""
    else:
        data = read_all()
    parts.append(opt.read_text(data, "standard input"))
    question = "\n\n".join(part.strip("\n") for part in parts if part.strip())
    if not question:
        raise UsageError(
            "there is no prompt",
            facts=["give it as an argument or on standard input"],
            tries=["nanorun run pico 'What is 17 + 25?'"],
        )
    return question


def read_schema(argument: str) -> Grammar:
    """The grammar of `--schema`: JSON itself, or the path of a file.

    Raises:
        UsageError: If it is neither.
    """
    from nanorun.model.chat import Grammar

    if argument.lstrip().startswith(("{", "true", "false")):
        text = opt.check_text(argument, "--schema")
    else:
        try:
            text = opt.read_text(Path(argument).read_bytes(), argument)
        except OSError as error:
            raise UsageError(f"{argument} cannot be read: {error.strerror or error}") from error
    try:
        json.loads(text)
    except ValueError as error:
        raise UsageError(f"--schema {argument[:80]}: not JSON: {error}") from error
    return Grammar("json_schema", text)


def to_messages(question: str, system: str | None) -> list[Message]:
    """The conversation that asks the question."""
    from nanorun.model.chat import Message

    before = [Message("system", opt.check_text(system, "--system"))] if system else []
    return [*before, Message("user", question)]


def open_client(
    model: str | None, n_ctx: str | None, endpoint: str | None, draft: str, leave: str | None
) -> tuple[Client, Callable[[], None]]:
    """A client for one request at a time, not started yet, and what to do once it has."""
    if endpoint is not None:
        return endpoints.open_endpoint(endpoint, model, n_ctx=n_ctx), lambda: None
    from nanorun.runtime.client import EngineClient

    assert model is not None
    path = find_model(model)
    fixed = EngineOptions(n_parallel=1, speculation=parse_draft(draft))
    opening = plan_opening(model, path, n_ctx, command="run", fixed=fixed, leave=leave)
    client = EngineClient(path, opening.options, smaller=opening.smaller, needs=opening.needs)
    return client, lambda: log_memory(opening, client.options, client.pid)


async def _answer(
    client: Client,
    on_loaded: Callable[[], None],
    messages: list[Message],
    request: GenerateOptions,
    output: TextOutput | JsonOutput,
    interrupts: Interrupts,
) -> int:
    from nanorun.chat.schema.following import SchemaCheck, checked

    refusal = None
    try:
        check = SchemaCheck(request)
        output.loading()
        info = await client.start()
        on_loaded()
        generation = client.generate(messages, request)
        interrupts.on_first = lambda: asyncio.ensure_future(generation.cancel())
        async for event in checked(generation, check):
            if event is not None:
                output.receive(event)
            refusal = getattr(event, "refusal", None)
        output.finish(info)
    finally:
        try:
            output.close()
        finally:
            await client.close()
    if refusal is not None:
        raise NanorunError(refusal)
    return ExitCode.INTERRUPTED if interrupts.count else ExitCode.OK
