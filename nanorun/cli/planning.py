"""From flags to a wish, and from a plan to how an engine is opened."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nanorun.cli.options import DEFAULT_N_CTX
from nanorun.cli.shapes import shape_of_file
from nanorun.errors import UsageError
from nanorun.model.units import format_gib

if TYPE_CHECKING:
    from nanorun.plan.hardware import Hardware
    from nanorun.plan.memory_plan import Plan, Wish
    from nanorun.runtime.options import EngineOptions

_MAX = "max"

log = logging.getLogger(__name__)


def parse_wish(
    n_ctx: str | None,
    *,
    default_n_ctx: int,
    n_parallel: int = 1,
    kv: str | None = None,
) -> Wish:
    """The wish that flags express.

    Raises:
        UsageError: If one of them cannot be meant.
    """
    from nanorun.model.ggml_type import GgmlType
    from nanorun.model.units import parse_count
    from nanorun.plan.memory_plan import KV_TYPES, Wish

    if n_ctx is None:
        tokens: int | None = default_n_ctx
    else:
        tokens = None if n_ctx.strip().lower() == _MAX else parse_count(n_ctx)
    type_kv = None if kv is None else GgmlType.from_name(kv)
    if type_kv is not None and type_kv not in KV_TYPES:
        names = ", ".join(t.label for t in KV_TYPES)
        raise UsageError(f"--kv {kv}: a KV cache is one of {names}")
    return Wish(n_ctx=tokens, n_parallel=n_parallel, type_kv=type_kv)


def engine_options(plan: Plan) -> EngineOptions:
    """The options that open an engine as planned."""
    from nanorun.runtime.options import EngineOptions

    s = plan.settings
    return EngineOptions(
        n_ctx=s.n_ctx, n_parallel=s.n_parallel, n_seq_spare=s.n_seq_spare, n_batch=s.n_ubatch,
        n_ubatch=s.n_ubatch, n_threads=plan.hardware.host.n_cores, n_gpu_layers=s.n_gpu_layers,
        n_cpu_moe=s.n_cpu_moe, type_k=s.type_k.label, type_v=s.type_v.label,
        checkpoint_bytes=s.checkpoint_bytes, archive_bytes=s.archive_bytes,
        speculation=plan.wish.speculation, n_draft=plan.wish.n_draft,
    )  # fmt: skip


def plan_engine_options(path: Path, wish: Wish, hardware: Hardware | None = None) -> EngineOptions:
    """How to open a file on a machine, this one if none is given.

    Raises:
        UsageError: If the wish cannot be meant.
        ModelError: If the file is damaged or no model that nanorun runs.
        MemoryPlanError: If nothing fits.
    """
    return engine_options(_plan_file(path, wish, hardware))


def smaller_plans(
    path: Path, wish: Wish, hardware: Hardware | None = None
) -> list[tuple[EngineOptions, str]]:
    """What to try, one after the other, when memory runs out with the options for this wish.

    Each comes with what it changes compared to the one before it.

    Raises:
        NanorunError: As `plan_engine_options`.
    """
    return _smaller_options(_plan_file(path, wish, hardware))


@dataclass(frozen=True, slots=True)
class Opening:
    """How a command opens its engine."""

    options: EngineOptions
    smaller: tuple[tuple[EngineOptions, str], ...]
    """What to try, one after the other, when memory runs out; see `smaller_plans`."""
    planned_bytes: int
    """What the engine's process is to take of main memory, before any prompt is saved."""


def plan_opening(
    model: str,
    path: Path,
    n_ctx: str | None,
    *,
    command: str,
    n_parallel: int = 1,
    keeps_texts: bool = False,
    speculation: str = "off",
    state_dir: str | None = None,
) -> Opening:
    """How a command opens a file on this machine, and what it falls back to.

    Args:
        model: What a person wrote as MODEL, for messages.
        path: The file that it stands for.
        n_ctx: The text of `--n-ctx`.
        command: The command, for suggestions.
        n_parallel: Requests at a time.
        keeps_texts: Whether many conversations go on, as behind an endpoint; see `Wish`.
        speculation: The text of `--draft`.
        state_dir: See `EngineOptions`.

    Raises:
        NanorunError: As `plan_engine_options`.
    """
    from nanorun.plan.hardware import detect_hardware
    from nanorun.plan.memory_plan import plan_model

    shape = shape_of_file(model, path)
    default = min(DEFAULT_N_CTX, shape.arch.n_ctx_train)
    wish = parse_wish(n_ctx, default_n_ctx=default, n_parallel=n_parallel)
    if speculation not in ("off", "lookup", "mtp"):
        raise UsageError(f"--draft {speculation}: it is off, lookup or mtp")
    wish = replace(wish, command=command, keeps_texts=keeps_texts, speculation=speculation)
    plan = plan_model([shape], detect_hardware(), wish)
    for line in plan.why:
        log.debug("plan: %s", line)

    def opened(options: EngineOptions) -> EngineOptions:
        return replace(options, state_dir=state_dir)

    return Opening(
        options=opened(engine_options(plan)),
        smaller=tuple((opened(options), change) for options, change in _smaller_options(plan)),
        planned_bytes=plan.uses[-1].total_bytes - plan.uses[-1].checkpoint_bytes,
    )


def log_memory(opening: Opening, pid: int | None) -> None:
    """Log what the engine's process was planned to take and what it takes once it has loaded."""
    if pid is None or not log.isEnabledFor(logging.DEBUG):
        return
    import psutil

    with suppress(psutil.Error):
        resident = int(psutil.Process(pid).memory_info().rss)
        planned = format_gib(opening.planned_bytes)
        log.debug("memory: %s planned, %s resident after loading", planned, format_gib(resident))


def _plan_file(path: Path, wish: Wish, hardware: Hardware | None) -> Plan:
    from nanorun.plan.hardware import detect_hardware
    from nanorun.plan.memory_plan import plan_model

    shape = shape_of_file(str(path), path)
    return plan_model([shape], hardware or detect_hardware(), wish)


def _smaller_options(plan: Plan) -> list[tuple[EngineOptions, str]]:
    from nanorun.plan.smaller import smaller_plans

    return [(engine_options(smaller.plan), smaller.change) for smaller in smaller_plans(plan)]
