"""Flags that several commands share, and what their texts mean."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from nanorun.errors import UsageError

SAMPLING = "Answering"
ENGINE = "Engine"
OUTPUT = "Output"

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Library name (pico) or path of a GGUF file.")
]
ThinkOption = Annotated[
    str,
    typer.Option(
        "--think",
        metavar="DEPTH",
        help="How much to think: off, low, medium, high, max, or a number of tokens.",
        rich_help_panel=SAMPLING,
    ),
]
NCtxOption = Annotated[
    str | None,
    typer.Option(
        "--n-ctx",
        metavar="N",
        help="Tokens the context holds: 8192, 256k, 1M, or max.  [default: at most 8192]",
        rich_help_panel=ENGINE,
    ),
]
LeaveOption = Annotated[
    str | None,
    typer.Option(
        "--leave",
        metavar="SIZE",
        help="Main memory left to other programs; 0 on a machine for the model alone."
        "  [default: 6 %, 1 GiB at least]",
        rich_help_panel=ENGINE,
    ),
]
StateOption = Annotated[
    bool,
    typer.Option(
        "--state/--no-state",
        help="Keep prompt state on disk, so that conversations go on after a restart.",
        rich_help_panel=ENGINE,
    ),
]
DraftOption = Annotated[
    str,
    typer.Option(
        "--draft",
        metavar="HOW",
        help="Guess tokens ahead: from earlier text (lookup), by the model's head (mtp), or off.",
        rich_help_panel=ENGINE,
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object instead.", rich_help_panel=OUTPUT),
]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Tell how the model is opened and why, and what memory it takes.",
        rich_help_panel=OUTPUT,
    ),
]

DEFAULT_MODEL = "pico"
DEFAULT_N_CTX = 8192


def check_text(text: str, name: str) -> str:
    """The text of an argument, if it is one.

    Python reads arguments in the encoding of the locale, and where that is ASCII (`LC_ALL=C`) as
    bytes; people's texts are UTF-8 there as well.

    Raises:
        UsageError: If it was made of bytes that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode("utf-8")
        except UnicodeError as error:
            raise UsageError(f"{name} is not UTF-8 text") from error
    return text


def read_text(source: bytes, name: str) -> str:
    """Bytes from outside as text.

    Raises:
        UsageError: If they are not UTF-8.
    """
    try:
        return source.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not UTF-8 text", facts=[f"byte {error.start} is {source[error.start]:#04x}"]
        ) from error
