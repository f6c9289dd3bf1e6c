"""The options of `nanorun serve` that are about the endpoint; `options` has those of the engine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nanorun.cli.options import ENGINE, OUTPUT

_NETWORK = "Network"


class ReasoningField(StrEnum):
    """Names under which chat completions can give the thinking."""

    REASONING = "reasoning"
    REASONING_CONTENT = "reasoning_content"
    BOTH = "both"

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that are sent."""
        if self is ReasoningField.BOTH:
            return ("reasoning", "reasoning_content")
        return (self.value,)


HostOption = Annotated[
    str,
    typer.Option(
        "--host",
        metavar="ADDRESS",
        help="Address to listen on; one that others can reach needs an API key.",
        rich_help_panel=_NETWORK,
    ),
]
PortOption = Annotated[
    int,
    typer.Option(
        "--port",
        metavar="N",
        min=0,
        max=65535,
        help="Port to listen on; 0 for any free one.",
        rich_help_panel=_NETWORK,
    ),
]
ApiKeyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar="NANORUN_API_KEY",
        help="Key that clients must send; may be repeated.",
        show_default=False,
        rich_help_panel=_NETWORK,
    ),
]
ApiKeyFileOption = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        metavar="FILE",
        help="Keys, one a line, as `name: key` or `key`, like NANORUN_API_KEYS.",
        show_default=False,
        rich_help_panel=_NETWORK,
    ),
]
MaxPerKeyOption = Annotated[
    int | None,
    typer.Option(
        "--max-per-key",
        metavar="N",
        min=1,
        help="Requests of one key at a time; the next is told to come back later (429).",
        show_default=False,
        rich_help_panel=_NETWORK,
    ),
]
AllowOriginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-origin",
        metavar="ORIGIN",
        help="Origin whose pages may ask and read answers (https://app.example, null, *);"
        " may be repeated.",
        show_default=False,
        rich_help_panel=_NETWORK,
    ),
]
AllowHostOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        metavar="NAME",
        help="Further name that requests may call this endpoint by (host.docker.internal);"
        " may be repeated.",
        show_default=False,
        rich_help_panel=_NETWORK,
    ),
]
TlsCertOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert",
        metavar="FILE",
        help="Certificate (PEM): answer over https.",
        show_default=False,
        rich_help_panel=_NETWORK,
    ),
]
TlsKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-key",
        metavar="FILE",
        help="The certificate's private key (PEM, no password).",
        show_default=False,
        rich_help_panel=_NETWORK,
    ),
]
MaxQueuedOption = Annotated[
    int,
    typer.Option(
        "--max-queued",
        metavar="N",
        min=0,
        help="Requests that may wait; the next is told to come back later (429).",
        rich_help_panel=_NETWORK,
    ),
]
MaxQueuedSizeOption = Annotated[
    str,
    typer.Option(
        "--max-queued-size",
        metavar="SIZE",
        help="Bodies of waiting requests together; a request beyond gets 429.",
        rich_help_panel=_NETWORK,
    ),
]
MaxWaitOption = Annotated[
    str,
    typer.Option(
        "--max-wait",
        metavar="TIME",
        help="A request that waits longer for its turn gets 429 (10m, forever).",
        rich_help_panel=_NETWORK,
    ),
]
ReadTimeoutOption = Annotated[
    str,
    typer.Option(
        "--read-timeout",
        metavar="TIME",
        help="Time that a request may take to arrive; then it is refused (408).",
        rich_help_panel=_NETWORK,
    ),
]
WriteTimeoutOption = Annotated[
    str,
    typer.Option(
        "--write-timeout",
        metavar="TIME",
        help="Time that a client may leave its answer unread; then it is let go.",
        rich_help_panel=_NETWORK,
    ),
]
AliasOption = Annotated[
    list[str] | None,
    typer.Option(
        "--alias",
        metavar="NAME",
        help="Further name of the model towards clients; may be repeated.",
        show_default=False,
        rich_help_panel=_NETWORK,
    ),
]
AnyModelOption = Annotated[
    bool,
    typer.Option(
        "--any-model",
        help="Answer to every model name that clients send.",
        rich_help_panel=_NETWORK,
    ),
]
OllamaOption = Annotated[
    bool,
    typer.Option(
        "--ollama/--no-ollama", help="Serve Ollama's routes, too.", rich_help_panel=_NETWORK
    ),
]
ReasoningFieldOption = Annotated[
    ReasoningField,
    typer.Option(
        "--reasoning-field",
        help="Where chat completions give the thinking.",
        rich_help_panel=_NETWORK,
    ),
]
LogRequestsOption = Annotated[
    bool,
    typer.Option(
        "--log-requests/--no-log-requests",
        help="Tell of each request on stderr, one line without contents.",
        rich_help_panel=OUTPUT,
    ),
]
LogContentsOption = Annotated[
    bool,
    typer.Option(
        "--log-contents",
        help="Tell what is asked and answered, too: 4 KiB of each, for debugging.",
        rich_help_panel=OUTPUT,
    ),
]
ParallelOption = Annotated[
    int,
    typer.Option(
        "--parallel",
        metavar="N",
        min=1,
        max=64,
        help="Requests answered at the same time; they share the context.",
        rich_help_panel=ENGINE,
    ),
]
KeepAliveOption = Annotated[
    str,
    typer.Option(
        "--keep-alive",
        metavar="TIME",
        help="Unload the model after that idle time (5m, 1h); a request loads it again.",
        rich_help_panel=ENGINE,
    ),
]
