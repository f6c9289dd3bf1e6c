"""`nanorun serve`: an OpenAI-style endpoint over one model."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from nanorun.cli import options as opt
from nanorun.cli.diagnostics import StatusLine, note
from nanorun.cli.models import context_size, display_name, find_model, state_folder
from nanorun.errors import UsageError

if TYPE_CHECKING:
    import socket

    from nanorun.runtime.client import EngineClient
    from nanorun.server.settings import ServerSettings

_NETWORK = "Network"


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
    state: opt.StateOption = True,
) -> None:
    """Answer over an OpenAI-style HTTP endpoint.

    Serves /v1/chat/completions, /v1/models and /health. SIGTERM or Ctrl-C lets answers under way
    finish; a second Ctrl-C does not.
    """
    from nanorun.runtime.client import EngineClient
    from nanorun.runtime.options import EngineOptions
    from nanorun.server.listen import bind
    from nanorun.server.settings import ServerSettings

    settings = ServerSettings(
        host=host,
        api_keys=tuple(api_keys or ()),
        n_parallel=n_parallel,
        think=opt.think_depth(think),
    )
    check_keys(settings)
    path = find_model(model)
    options = EngineOptions(
        n_ctx=context_size(n_ctx, path),
        n_parallel=n_parallel,
        state_dir=state_folder(keep=state),
    )
    # Bound before the model is loaded: a port that is taken should not cost that wait.
    listener = bind(host, port)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="nanorun: %(message)s")
    asyncio.run(_serve(EngineClient(path, options), display_name(model), listener, settings))


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
    client: EngineClient, name: str, listener: socket.socket, settings: ServerSettings
) -> None:
    from nanorun.server.app import create_app
    from nanorun.server.listen import serve, url_of

    status = StatusLine()
    try:
        status.show(f"loading {name} ...")
        info = await client.start()
        status.clear()
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
