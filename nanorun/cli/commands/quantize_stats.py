"""`nanorun quantize-stats`: what a recipe's types lose, role by role."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nanorun.cli import options as opt
from nanorun.cli.commands.convert import source_named
from nanorun.cli.diagnostics import StatusLine, write_data, write_json


def command(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder of a source model, or pico.")
    ],
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="NAME", help="As for nanorun convert.")
    ] = "q4",
    pad: Annotated[
        str, typer.Option("--pad", metavar="MODE", help="As for nanorun convert.")
    ] = "auto",
    imatrix: Annotated[
        Path | None,
        typer.Option("--imatrix", metavar="FILE", help="Weigh errors by this importance matrix."),
    ] = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Show what a recipe's types lose on a source model.

    From a sample of rows, so it takes seconds. The error is the noise in a product's output against
    the output, as a ratio of root mean squares; under an imatrix with the inputs it has seen.
    """
    from nanorun.model.units import format_gib
    from nanorun_converters.conversion_plan import plan_conversion
    from nanorun_converters.options import ConvertOptions
    from nanorun_converters.types.search import role_stats

    options = ConvertOptions(recipe=recipe, pad=pad, imatrix=imatrix, dry_run=True)
    plan = plan_conversion(source_named(source), options)
    status = StatusLine()
    try:
        stats = role_stats(
            plan.tensors, plan.imatrix, plan.quantizer.open(), plan.feedbacks, status.show
        )
    finally:
        status.clear()
    if as_json:
        write_json({
            s.role.value: {"type": s.type.label, "bytes": s.n_bytes, "rel_rmse": s.rel_rmse}
            for s in stats
        })  # fmt: skip
        return
    write_data(f"{'role':12} {'type':8} {'size':>12} {'error':>8}\n")
    for s in stats:
        size = format_gib(s.n_bytes)
        write_data(f"{s.role.value:12} {s.type.label:8} {size:>12} {s.rel_rmse:8.4f}\n")
