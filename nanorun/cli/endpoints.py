"""`--endpoint`: commands that talk to a model elsewhere instead of opening one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from nanorun.cli import options as opt
from nanorun.errors import UsageError

if TYPE_CHECKING:
    from nanorun.runtime.remote import RemoteClient

EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        metavar="URL",
        help="Ask an OpenAI-style endpoint instead of opening a model here; its key comes from "
        "NANORUN_API_KEY.",
        rich_help_panel=opt.ENGINE,
    ),
]
_MODEL = "Library name (pico) or path of a GGUF file; with --endpoint, its name there."
ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help=_MODEL, show_default=False)
]
ModelOrPicoArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=f"{_MODEL}  [default: pico]", show_default=False),
]


def open_endpoint(url: str, model: str | None, *, n_ctx: str | None = None) -> RemoteClient:
    """A client of the endpoint, not connected yet.

    Args:
        url: Its address.
        model: The model's name there; None for the only one.
        n_ctx: What `--n-ctx` said; the endpoint has settled that already.

    Raises:
        UsageError: If the flags or the address make no sense.
    """
    if n_ctx is not None:
        raise UsageError("--n-ctx is for a model that is opened here, and --endpoint opens none")
    from nanorun.runtime.remote import RemoteClient

    return RemoteClient(url, model)
