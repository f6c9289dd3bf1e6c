"""`nanorun plan`: what a model takes on a machine, before it is downloaded or loaded."""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanorun.cli import options as opt
from nanorun.cli.diagnostics import write_data, write_json
from nanorun.cli.planning import parse_draft, parse_wish
from nanorun.cli.shapes import shapes_of_model
from nanorun.errors import MemoryPlanError, UsageError
from nanorun.model.engine_options import EngineOptions

if TYPE_CHECKING:
    from nanorun.plan.machine.hardware import Hardware
    from nanorun.plan.plan import Plan

_MACHINE = "Machine"
_WISH = "Wish"
_FILL = 512


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Library name (nano, nano:q4), GGUF file, or folder of a source model; also an"
            " https address of a GGUF, or owner/name and owner/name/file.gguf on the Hub.",
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
    draft: Annotated[
        str,
        typer.Option(
            "--draft",
            metavar="HOW",
            help="Plan for guessing tokens ahead: off, lookup, or mtp.",
            rich_help_panel=_WISH,
        ),
    ] = "off",
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
    leave: opt.LeaveOption = None,
    hardware: Annotated[
        Path | None,
        typer.Option(
            "--hardware",
            metavar="FILE",
            help="Plan for the machine of a profile, as `nanorun doctor --json` prints it.",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="Ask the installed engine what the context takes, without loading the model.",
        ),
    ] = False,
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
    from nanorun.plan.machine.hardware import HOST
    from nanorun.plan.memory_plan import plan_model
    from nanorun.plan.report import plan_keys, render_plan

    if measure_speed and hardware is not None:
        raise UsageError(
            "--measure-speed times this machine, and --hardware describes another one",
            tries=[f"nanorun plan {model} --measure-speed"],
        )
    shapes = shapes_of_model(model, recipe)
    default = min(opt.DEFAULT_N_CTX, shapes[0].arch.n_ctx_train)
    wish = parse_wish(
        n_ctx, default_n_ctx=default, kv=kv,
        command=_with_flags(hardware, device, vram, ram, leave, draft),
        fixed=EngineOptions(n_parallel=n_parallel, speculation=parse_draft(draft)),
    )  # fmt: skip
    machine = _machine(hardware, device, vram, ram, leave)
    try:
        plan = plan_model(shapes, machine, wish)
    except MemoryPlanError as error:
        if as_json:
            write_json({"fits": False, "why": [error.message, *error.facts],
                        "tries": list(error.tries)})  # fmt: skip
        raise
    if (probe or verify) and hardware is not None and plan.uses[0].name != HOST:
        raise UsageError(
            f"this machine's engine cannot be asked about {plan.uses[0].name} of {hardware}",
            tries=[f"nanorun plan {model} --hardware {hardware} --device cpu --probe"],
        )
    if hardware is None:
        plan = _calibrated(plan, measure=measure_speed)
    keys, text = plan_keys(plan), render_plan(plan)
    if probe:
        probed, shown = _probe(plan)
        keys, text = keys | probed, f"{text}\n{shown}"
    if verify:
        verified, shown = _verify(plan)
        keys, text = keys | verified, f"{text}\n{shown}"
    if as_json:
        write_json(keys)
    else:
        write_data(text)


def _machine(
    profile: Path | None, device: str, vram: str | None, ram: str | None, leave: str | None
) -> Hardware:
    from nanorun.cli.benchmarks import with_known_speeds
    from nanorun.model.units import parse_size
    from nanorun.plan.machine.hardware import detect_hardware, read_profile

    machine = with_known_speeds(detect_hardware()) if profile is None else read_profile(profile)
    return machine.restricted(
        device,
        vram=None if vram is None else parse_size(vram),
        ram=None if ram is None else parse_size(ram),
        leave=None if leave is None else parse_size(leave),
    )


def _with_flags(
    profile: Path | None,
    device: str,
    vram: str | None,
    ram: str | None,
    leave: str | None,
    draft: str,
) -> str:
    """The command with the flags that hold whatever else is tried, for suggestions."""
    flags = {"--device": None if device == "auto" else device, "--vram": vram, "--ram": ram,
             "--leave": leave, "--hardware": profile,
             "--draft": None if draft == "off" else draft}  # fmt: skip
    given = [(flag, str(value)) for flag, value in flags.items() if value is not None]
    return shlex.join(["plan", *chain.from_iterable(given)])


def _calibrated(plan: Plan, *, measure: bool) -> Plan:
    """The plan with this machine's measured speed, where the processor does the work."""
    from nanorun.cli import calibration

    if plan.options.n_gpu_layers != 0 and plan.hardware.accelerators:
        return plan
    found = calibration.known_speed(plan.shape, plan.hardware)
    if measure:
        found = calibration.measure_speed(plan.shape, plan.hardware)
    return replace(plan, calibration=found)


def _probe(plan: Plan) -> tuple[dict[str, Any], str]:
    from nanorun.plan.verification import Probe, probe_keys, render_probe
    from nanorun.runtime.measure.probe import probe_plan
    from nanorun_converters.opened.shape_file import write_shape

    with tempfile.TemporaryDirectory(prefix="nanorun-") as folder:
        path = plan.shape.path
        if path is None:
            # The engine reads the header only: a file without data has all it asks for.
            path = Path(folder) / "shape.gguf"
            write_shape(path, plan.shape.arch, {t.name: t.type for t in plan.shape.tensors})
        found = Probe(plan, probe_plan(path, plan.options))
    return probe_keys(found), render_probe(found)


def _verify(plan: Plan) -> tuple[dict[str, Any], str]:
    from nanorun.plan.verification import Verification, render_verification, verification_keys
    from nanorun.runtime.measure.probe import measure, probe_plan

    path = plan.shape.path
    if path is None:
        raise UsageError(
            f"--verify loads the model, and {plan.shape.name} is not a file",
            tries=["nanorun plan FILE.gguf --verify"],
        )
    options = plan.options
    n_fill = min(_FILL, options.n_ctx // 2)
    verified = Verification(
        plan=plan,
        probed=probe_plan(path, options),
        measured=measure(path, options, n_fill),
        n_fill=n_fill,
    )
    return verification_keys(verified), render_verification(verified)
