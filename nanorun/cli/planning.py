"""From flags to a wish, and from a plan to how an engine is opened."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nanorun.cli.options import DEFAULT_N_CTX
from nanorun.cli.shapes import shape_of_file
from nanorun.errors import UsageError
from nanorun.model.units import format_gib

if TYPE_CHECKING:
    from nanorun.model.engine_options import EngineOptions
    from nanorun.plan.memory_plan import Plan, Wish

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
    from nanorun.model.engine_options import EngineOptions

    s = plan.settings
    return EngineOptions(
        n_ctx=s.n_ctx, n_parallel=s.n_parallel, n_seq_spare=s.n_seq_spare, n_batch=s.n_ubatch,
        n_ubatch=s.n_ubatch, n_threads=plan.hardware.host.n_cores, n_gpu_layers=s.n_gpu_layers,
        n_cpu_moe=s.n_cpu_moe, type_k=s.type_k.label, type_v=s.type_v.label,
        checkpoint_bytes=s.checkpoint_bytes, archive_bytes=s.archive_bytes,
        speculation=plan.wish.speculation, n_draft=plan.wish.n_draft,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Opening:
    """How a command opens its engine."""

    options: EngineOptions
    smaller: tuple[tuple[EngineOptions, str], ...]
    """What to try, one after the other, when memory runs out, each with what it changes."""
    planned_bytes: Mapping[EngineOptions, int]
    """What the engine's process is to take of main memory so opened, before any prompt is saved."""


def parse_draft(text: str) -> str:
    """The text of `--draft`.

    Raises:
        UsageError: If it cannot be meant.
    """
    if text not in ("off", "lookup", "mtp"):
        raise UsageError(f"--draft {text}: it is off, lookup or mtp")
    return text


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
        UsageError: If the flags cannot be meant.
        ModelError: If the file is damaged or no model that nanorun runs.
        MemoryPlanError: If nothing fits.
    """
    from nanorun.plan.machine.hardware import detect_hardware
    from nanorun.plan.memory_plan import plan_model
    from nanorun.plan.smaller import smaller_plans

    shape = shape_of_file(model, path)
    default = min(DEFAULT_N_CTX, shape.arch.n_ctx_train)
    wish = parse_wish(n_ctx, default_n_ctx=default, n_parallel=n_parallel)
    wish = replace(
        wish, command=command, keeps_texts=keeps_texts, speculation=parse_draft(speculation)
    )
    plan = plan_model([shape], detect_hardware(), wish)
    for line in plan.why:
        log.debug("plan: %s", line)

    def opened(plan: Plan) -> EngineOptions:
        return replace(engine_options(plan), state_dir=state_dir)

    smaller = smaller_plans(plan)
    return Opening(
        options=opened(plan),
        smaller=tuple((opened(less.plan), less.change) for less in smaller),
        planned_bytes={
            opened(p): p.uses[-1].total_bytes - p.uses[-1].checkpoint_bytes
            for p in (plan, *(less.plan for less in smaller))
        },
    )


def memory_facts(opening: Opening, options: EngineOptions, pid: int | None) -> str | None:
    """What the engine's process was planned to take, and takes now; None without a process.

    Args:
        opening: How the command opens its engine.
        options: How it is open, which is smaller where memory ran out.
        pid: Its process.
    """
    if pid is None:
        return None
    import psutil

    with suppress(psutil.Error):
        resident = format_gib(int(psutil.Process(pid).memory_info().rss))
        return f"{format_gib(opening.planned_bytes[options])} planned, {resident} resident"
    return None


def log_memory(opening: Opening, options: EngineOptions, pid: int | None) -> None:
    """Log `memory_facts` once the model has loaded."""
    if log.isEnabledFor(logging.DEBUG) and (facts := memory_facts(opening, options, pid)):
        log.debug("memory: %s after loading", facts)
