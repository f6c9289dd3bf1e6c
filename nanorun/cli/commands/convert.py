"""`nanorun convert`: a source model into a quantized GGUF."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nanorun.cli import options as opt
from nanorun.cli.diagnostics import is_terminal, note, write_data, write_json
from nanorun.errors import ModelError, UsageError
from nanorun_quant.recipes import RECIPES

if TYPE_CHECKING:
    from nanorun_converters.conversion_plan import ConversionPlan
    from nanorun_converters.convert import ConvertProgress, ConvertResult
    from nanorun_converters.source.files import Files

_TYPES = "Types"


# As long as there are flags: Typer reads them from the signature.
def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Folder of a source model, a repository on the Hub (owner/name[@revision]), a GGUF"
            " in BF16, F16 or F32, or a name such as nano or pico.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="File to write.  [default: SRC-RECIPE.gguf, in this folder]",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            metavar="NAME",
            help=f"{', '.join(RECIPES)}; a type for every role (q8_0, bf16, ...); or llama.cpp's"
            " preset (Q4_K_M, ...), without its fallbacks.",
            rich_help_panel=_TYPES,
        ),
    ] = "q8_0",
    type_map: Annotated[
        list[str] | None,
        typer.Option(
            "--type-map",
            metavar="ROLE=TYPE",
            help="The type of one role (expert_up, ssm_in, ...), or of all with *; repeatable.",
            rich_help_panel=_TYPES,
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            "--target-size",
            metavar="SIZE",
            help="Search the types that lose least in a file of this size (14.6GB), per tensor.",
            rich_help_panel=_TYPES,
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            "--target-bpw",
            metavar="BITS",
            min=1.0,
            help="The same, with this many bits per weight.",
            rich_help_panel=_TYPES,
        ),
    ] = None,
    pad: Annotated[
        str,
        typer.Option(
            "--pad",
            metavar="MODE",
            help="Pad sizes to whole blocks, which changes no answer: auto, never or always.",
            rich_help_panel=_TYPES,
        ),
    ] = "auto",
    imatrix: Annotated[
        Path | None,
        typer.Option(
            "--imatrix",
            metavar="FILE",
            help="Importance matrix, from nanorun imatrix or llama-imatrix.",
            rich_help_panel=_TYPES,
        ),
    ] = None,
    feedback: Annotated[
        str,
        typer.Option(
            "--feedback",
            metavar="MODE",
            help="Let columns make up for each other's errors: auto, where the imatrix was"
            " collected with --gram; never.",
            rich_help_panel=_TYPES,
        ),
    ] = "auto",
    quantizer: Annotated[
        str,
        typer.Option(
            "--quantizer",
            metavar="NAME",
            help="ggml, whose bytes are llama.cpp's; torch, nearer to the source in K types and"
            " IQ4; auto: torch where there is a GPU.",
            rich_help_panel=_TYPES,
        ),
    ] = "auto",
    n_threads: Annotated[
        int | None,
        typer.Option(
            "--threads", metavar="N", min=1, help="Threads that quantize.  [default: one a core]"
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what each role becomes and the exact size; write nothing.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace an existing file.", rich_help_panel=opt.OUTPUT),
    ] = False,
    split_max_size: Annotated[
        str | None,
        typer.Option(
            "--split-max-size",
            metavar="SIZE",
            help="Split into files no larger than this, such as 16GiB.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    no_mtp: Annotated[
        bool,
        typer.Option(
            "--no-mtp", help="Leave a multi-token prediction head out.", rich_help_panel=_TYPES
        ),
    ] = False,
    chat_template: Annotated[
        str | None,
        typer.Option(
            "--chat-template",
            metavar="FILE",
            help="Write this chat template instead of the source's; family: that of Nemotron 3"
            " Nano's formats.",
        ),
    ] = None,
    ignore_field: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore-field",
            metavar="NAME",
            help="Pass over a field of config.json that is not understood, and write so into the"
            " file; repeatable.",
        ),
    ] = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Turn a source model (safetensors) into a quantized GGUF.

    One pass, in memory that does not grow with the model. The file appears under its name only
    when it is whole. A conversion that was stopped goes on when the same command is typed again.
    """
    from nanorun.model.units import parse_size
    from nanorun_converters.conversion_plan import plan_conversion
    from nanorun_converters.convert import summarize, write_plan
    from nanorun_converters.options import ConvertOptions

    started = time.monotonic()
    options = ConvertOptions(
        out=out, recipe=recipe, type_map=parse_type_map(type_map or ()), pad=pad,
        target_bytes=None if target_size is None else parse_size(target_size),
        target_bpw=target_bpw, imatrix=imatrix, feedback=feedback, quantizer=quantizer,
        n_threads=n_threads, force=force, dry_run=dry_run, keep_mtp=not no_mtp,
        split_max_bytes=None if split_max_size is None else parse_size(split_max_size),
        ignored_fields=tuple(ignore_field or ()), chat_template=chat_template,
    )  # fmt: skip
    with _told_as_notes():
        plan = plan_conversion(source_named(source), options)
    for text in plan.notes:
        note(text)
    if dry_run:
        result = summarize(plan, plan.lay_out(), started)
    else:
        with _told_as_notes(), _progress_bar() as progress, _told_of_interrupt(plan):
            result = write_plan(plan, options, progress, started)
    if as_json:
        write_json(asdict(result))
    else:
        write_data(_render(plan, result, dry_run))


def source_named(text: str) -> Path | Files:
    """What SRC stands for: a path, or the files of a repository on the Hub.

    Raises:
        ModelError: If it cannot be opened, or names a model that the Hub does not have.
        NanorunError: If the Hub cannot be reached.
    """
    from nanorun.library import BUNDLED_MODELS, CATALOG

    if text in BUNDLED_MODELS:
        return BUNDLED_MODELS[text]
    try:
        path = Path(text).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(f"{text:.200} cannot be opened: {reason}") from error
    from nanorun_converters.source.hub import HubFiles, parse_repository

    name, at, revision = text.partition("@")
    known = CATALOG.get(name)
    if known is not None and known.repository is not None:
        text = f"{known.repository}{at}{revision}"
    repository = None if path.suffix.lower() == ".gguf" else parse_repository(text)
    return path if repository is None else HubFiles(*repository)


def parse_type_map(entries: list[str] | tuple[str, ...]) -> dict[str, str]:
    """`ROLE=TYPE` texts, each one or several with commas, as role to type.

    Raises:
        UsageError: If one is of another form, or a role is there twice.
    """
    types: dict[str, str] = {}
    for entry in (part.strip() for text in entries for part in text.split(",")):
        role, equals, type_name = entry.partition("=")
        if not (role and equals and type_name):
            raise UsageError(
                f"--type-map {entry!r} is not of the form ROLE=TYPE",
                tries=["nanorun convert SRC --type-map expert_up=mxfp4"],
            )
        if types.setdefault(role, type_name) != type_name:
            raise UsageError(f"--type-map names {role} twice: {types[role]} and {type_name}")
    return types


@contextmanager
def _told_of_interrupt(plan: ConversionPlan) -> Iterator[None]:
    from nanorun_converters.output.files import part_of
    from nanorun_converters.output.gguf_header import split_paths

    try:
        yield
    except KeyboardInterrupt:
        note(f"stopped; {plan.out} was not written")
        part = part_of(split_paths(plan.out, len(plan.lay_out()))[0])
        if part.exists():
            note(f"the same command goes on from {part}; delete it to start anew")
        raise


@contextmanager
def _told_as_notes() -> Iterator[None]:
    """Show what the converter has to say in the form of this program's notes."""

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage())

    log, handler = logging.getLogger("nanorun_converters"), Notes(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextmanager
def _progress_bar() -> Iterator[Callable[[ConvertProgress], None] | None]:
    """A bar on stderr where a person sees it, and nothing elsewhere."""
    if not is_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading")

        def show(progress: ConvertProgress) -> None:
            bar.update(
                task,
                description=progress.tensor,
                completed=progress.n_bytes_done,
                total=progress.n_bytes,
            )

        yield show


def _render(plan: ConversionPlan, result: ConvertResult, dry_run: bool) -> str:
    from nanorun.model.units import format_gib
    from nanorun_converters.conversion_plan import encoding_of

    size = f"{format_gib(result.bytes)} ({result.bytes:,} bytes), {result.bpw:.2f} bits per weight"
    done = "would be" if dry_run else f"took {result.seconds:.1f} s,"
    lines = [f"{shlex.quote(result.path)} {done} {size}"]
    if not plan.has_tokenizer:
        lines.append(
            "without tokenizer.json, which is not there: it adds 12 bytes and the text of each of"
            f" {plan.arch.n_vocab:,} tokens, 8 and the text of each merge, and the chat template"
        )
    if plan.quantizer.device or plan.feedbacks:
        lines.append(f"quantized by {encoding_of(plan.quantizer, plan.feedbacks)}")
    for name, (n_from, n_to) in result.padding.items():
        lines.append(f"padded: {name} {n_from} to {n_to} (+{n_to / n_from - 1:.1%})")
    lines.append("")
    rows = [("role", "type", "tensors", "size", "why")]
    rows += [
        (r.role.value, r.type.label, str(r.n_tensors), format_gib(r.n_bytes), r.reason)
        for r in plan.by_role()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for role, type_, n_tensors, n_bytes, reason in rows:
        lines.append(
            f"{role:{widths[0]}}  {type_:{widths[1]}}  {n_tensors:>{widths[2]}}"
            f"  {n_bytes:>{widths[3]}}  {reason}"
        )
    return "\n".join(lines) + "\n"
