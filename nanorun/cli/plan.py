"""`nanorun plan`: what a model takes on a machine, before it is downloaded or loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanorun.cli import options as opt
from nanorun.cli.diagnostics import write_data, write_json
from nanorun.cli.planning import parse_wish, shapes_of_model
from nanorun.errors import MemoryPlanError, UsageError

if TYPE_CHECKING:
    from nanorun.plan.hardware import Hardware
    from nanorun.plan.memory_plan import Plan

_MACHINE = "Machine"
_WISH = "Wish"
_FILL = 512


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Library name (nano, nano:q4), GGUF file, or folder of a source model.",
        ),
    ],
    n_ctx: opt.NCtxOption = None,
    n_parallel: Annotated[
        int,
        typer.Option(
            "--parallel", metavar="N", help="Requests answered at a time.", rich_help_panel=_WISH
        ),
    ] = 1,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME",
            help="Recipe of the conversion.  [default: the best that fits]",
            rich_help_panel=_WISH,
        ),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(
            "--kv",
            metavar="TYPE",
            help="Type of the KV cache: f16, q8_0, q4_0.  [default: the best that fits]",
            rich_help_panel=_WISH,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar="NAME", help="auto, cpu, or cuda:0.", rich_help_panel=_MACHINE
        ),
    ] = "auto",
    vram: Annotated[
        str | None,
        typer.Option(
            "--vram",
            metavar="SIZE",
            help="Memory of each accelerator to plan with.  [default: what is free]",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    ram: Annotated[
        str | None,
        typer.Option(
            "--ram",
            metavar="SIZE",
            help="Main memory to plan with.  [default: what is available]",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    hardware: Annotated[
        Path | None,
        typer.Option(
            "--hardware",
            metavar="FILE",
            help="Plan for the machine of a profile, as `nanorun doctor --json` prints it.",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Load the model and compare the plan with what it takes."),
    ] = False,
    measure_speed: Annotated[
        bool,
        typer.Option(
            "--measure-speed",
            help="Time a slice of the model on this machine; kept for later plans.",
        ),
    ] = False,
    as_json: opt.JsonOption = False,
) -> None:
    """Show what a model takes on a machine, before any download.

    A name of the library is enough. Says why each thing is chosen, and what would help when nothing
    fits.
    """
    from nanorun.plan.memory_plan import plan_model
    from nanorun.plan.report import plan_keys, render_plan

    shapes = shapes_of_model(model, recipe)
    default = min(opt.DEFAULT_N_CTX, shapes[0].arch.n_ctx_train)
    wish = parse_wish(n_ctx, default_n_ctx=default, n_parallel=n_parallel, kv=kv)
    machine = _machine(hardware, device, vram, ram)
    try:
        plan = plan_model(shapes, machine, wish)
    except MemoryPlanError as error:
        if as_json:
            write_json({"fits": False, "why": [error.message, *error.facts],
                        "tries": list(error.tries)})  # fmt: skip
        raise
    if hardware is None:
        plan = _calibrated(plan, measure=measure_speed)
    keys, text = plan_keys(plan), render_plan(plan)
    if verify:
        verified, shown = _verify(plan)
        keys, text = keys | verified, f"{text}\n{shown}"
    if as_json:
        write_json(keys)
    else:
        write_data(text)


def _machine(profile: Path | None, device: str, vram: str | None, ram: str | None) -> Hardware:
    from nanorun.model.units import parse_size
    from nanorun.plan.hardware import detect_hardware, read_profile

    machine = detect_hardware() if profile is None else read_profile(profile)
    return machine.restricted(
        device,
        vram=None if vram is None else parse_size(vram),
        ram=None if ram is None else parse_size(ram),
    )


def _calibrated(plan: Plan, *, measure: bool) -> Plan:
    """The plan with this machine's measured speed, where the processor does the work."""
    from nanorun.cli import calibration

    if plan.settings.n_gpu_layers != 0 and plan.hardware.accelerators:
        return plan
    found = calibration.known_speed(plan.shape, plan.hardware)
    if measure:
        found = calibration.measure_speed(plan.shape, plan.hardware)
    return replace(plan, calibration=found)


def _verify(plan: Plan) -> tuple[dict[str, Any], str]:
    from nanorun.plan.probe import measure, predicted_context, probe_contexts
    from nanorun.plan.report import comparison, render_comparison

    path = plan.shape.path
    if path is None:
        raise UsageError(
            f"--verify loads the model, and {plan.shape.name} is not a file",
            tries=["nanorun plan FILE.gguf --verify"],
        )
    settings = plan.settings
    n_fill = min(_FILL, settings.n_ctx // 2)
    measured = measure(path, settings, n_fill)
    probed = probe_contexts(path, [settings])[0]
    predicted = predicted_context(plan.shape.arch, settings)
    rows = comparison(predicted, probed, measured, plan, n_fill)
    keys = {
        "measured": rows,
        "max_error": max(row["error"] for row in rows),
        "measured_decode_tps": round(measured.decode_tps, 2),
        "measured_prefill_tps": round(measured.prefill_tps, 2),
        "load_s": round(measured.load_s, 2),
        "base_bytes": measured.base_bytes,
        "resident_bytes": measured.resident_bytes,
    }
    speed = (
        f"measured: decode {measured.decode_tps:.1f} t/s, prefill {measured.prefill_tps:.1f} t/s,"
        f" load {measured.load_s:.1f} s"
    )
    return keys, f"{render_comparison(rows)}{speed}\n"
