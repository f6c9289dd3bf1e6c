"""`nanorun serve`: an OpenAI-style endpoint over one model."""

from __future__ import annotations

import asyncio
import signal
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from nanorun.cli import options as opt
from nanorun.cli.diagnostics import StatusLine, note, show_logs
from nanorun.cli.models import display_name, find_model, state_folder
from nanorun.cli.planning import Opening, log_memory, parse_draft, plan_opening
from nanorun.errors import UsageError
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import Think
from nanorun.model.units import parse_duration

if TYPE_CHECKING:
    import socket

    from nanorun.runtime.client import EngineClient
    from nanorun.server.settings import ServerSettings

_NETWORK = "Network"


class ThinkingField(StrEnum):
    """Names of the thinking in chat completions."""

    REASONING = "reasoning"
    REASONING_CONTENT = "reasoning_content"
    BOTH = "both"


_THINKING_FIELDS = {
    ThinkingField.REASONING: ("reasoning",),
    ThinkingField.REASONING_CONTENT: ("reasoning_content",),
    ThinkingField.BOTH: ("reasoning", "reasoning_content"),
}


def command(
    model: opt.ModelArgument = opt.DEFAULT_MODEL,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="ADDRESS",
            help="Address to listen on; one that others can reach needs an API key.",
            rich_help_panel=_NETWORK,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            "--port",
            metavar="N",
            min=0,
            max=65535,
            help="Port to listen on; 0 for any free one.",
            rich_help_panel=_NETWORK,
        ),
    ] = 8080,
    api_keys: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="NANORUN_API_KEY",
            help="Key that clients must send; may be repeated.",
            show_default=False,
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    allow_origins: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin",
            metavar="ORIGIN",
            help="Page of elsewhere that may ask (https://app.example, * for any); repeatable.",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    allow_hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            help="Further name of this machine (host.docker.internal); repeatable.",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    max_queued: Annotated[
        int,
        typer.Option(
            "--max-queued",
            metavar="N",
            min=0,
            help="Requests that may wait; further ones are sent away with 429.",
            rich_help_panel=_NETWORK,
        ),
    ] = 512,
    any_model: Annotated[
        bool,
        typer.Option(
            "--any-model", help="Answer whatever model a request names.", rich_help_panel=_NETWORK
        ),
    ] = False,
    ollama: Annotated[
        bool,
        typer.Option(
            "--ollama/--no-ollama", help="Serve Ollama's routes, too.", rich_help_panel=_NETWORK
        ),
    ] = True,
    thinking_field: Annotated[
        ThinkingField,
        typer.Option(
            "--reasoning-field",
            help="Name under which chat completions give the thinking.",
            rich_help_panel=_NETWORK,
        ),
    ] = ThinkingField.REASONING,
    think: opt.ThinkOption = "medium",
    n_ctx: opt.NCtxOption = None,
    n_parallel: Annotated[
        int,
        typer.Option(
            "--parallel",
            metavar="N",
            min=1,
            max=64,
            help="Requests answered at the same time; they share the context.",
            rich_help_panel=opt.ENGINE,
        ),
    ] = 4,
    leave: opt.LeaveOption = None,
    draft: opt.DraftOption = "off",
    keep_alive: Annotated[
        str,
        typer.Option(
            "--keep-alive",
            metavar="TIME",
            help="Unload the model after that idle time (5m, 1h); a request loads it again.",
            rich_help_panel=opt.ENGINE,
        ),
    ] = "forever",
    state: opt.StateOption = True,
    verbose: opt.VerboseOption = False,
) -> None:
    """Answer over HTTP, in the words of OpenAI, Anthropic and Ollama.

    Serves /v1/chat/completions, /v1/completions, /v1/models, /v1/messages, Ollama's /api/chat,
    /api/generate, /api/tags, /api/show and /api/ps, and /health. SIGTERM or Ctrl-C lets answers
    under way finish; a second Ctrl-C does not.
    """
    from nanorun.runtime.client import EngineClient
    from nanorun.server.listen import bind
    from nanorun.server.settings import ServerSettings

    settings = ServerSettings(
        host=host,
        api_keys=tuple(api_keys or ()),
        n_parallel=n_parallel,
        think=Think.parse(think),
        allowed_origins=tuple(allow_origins or ()),
        allowed_hosts=tuple(allow_hosts or ()),
        max_queued=max_queued,
        any_model=any_model,
        ollama=ollama,
        thinking_fields=_THINKING_FIELDS[thinking_field],
    )
    check_keys(settings)
    show_logs(verbose=verbose)
    path = find_model(model)
    fixed = EngineOptions(
        n_parallel=n_parallel, speculation=parse_draft(draft), state_dir=state_folder(keep=state)
    )
    opening = plan_opening(
        model, path, n_ctx, command="serve", fixed=fixed, leave=leave, keeps_texts=True
    )
    client = EngineClient(
        path,
        opening.options,
        smaller=opening.smaller,
        needs=opening.needs,
        keep_alive_s=_idle_limit(keep_alive),
    )
    # Bound before the model is loaded: a port that is taken should not cost that wait.
    listener = bind(host, port)
    asyncio.run(_serve(client, opening, display_name(model), listener, settings))


def _idle_limit(keep_alive: str) -> float | None:
    """Seconds of `--keep-alive`; None to keep the model for good."""
    return None if keep_alive.strip().lower() == "forever" else parse_duration(keep_alive)


def check_keys(settings: ServerSettings) -> None:
    """Let nobody's machine be open to its network by accident.

    Raises:
        UsageError: If others can reach the endpoint and it asks for no key, or for an empty one.
    """
    if not all(key.strip() for key in settings.api_keys):
        raise UsageError("an API key is empty")
    if settings.is_local or settings.api_keys:
        return
    raise UsageError(
        f"listening on {settings.host} lets others in, and there is no API key",
        facts=["a key may come from --api-key or from NANORUN_API_KEY"],
        tries=[f"NANORUN_API_KEY=$(openssl rand -hex 16) nanorun serve --host {settings.host}"],
    )


async def _serve(
    client: EngineClient,
    opening: Opening,
    name: str,
    listener: socket.socket,
    settings: ServerSettings,
) -> None:
    from nanorun.server.app import create_app
    from nanorun.server.listen import serve, url_of

    status = StatusLine()
    try:
        status.show(f"loading {name} ...")
        info = await client.start()
        status.clear()
        log_memory(opening, client.options, client.pid)
        greeting = (
            f"serving {name} on {url_of(listener)} "
            f"(n_ctx {info.n_ctx}, {settings.n_parallel} in parallel, {info.device})"
        )
        # The server repeats the signal that stopped it once it is done; ending well is no failure.
        signal.signal(signal.SIGTERM, lambda _signum, _frame: None)
        app = create_app(client, model_name=name, settings=settings)
        await serve(app, listener, settings, lambda _server: note(greeting))
    finally:
        status.clear()
        listener.close()
        await client.close()
