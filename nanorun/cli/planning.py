"""From flags to a wish, and from a plan to how a command opens its engine."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanorun.cli.options import DEFAULT_N_CTX
from nanorun.cli.shapes import shape_of_file
from nanorun.errors import UsageError
from nanorun.model.units import format_gib

if TYPE_CHECKING:
    from nanorun.model.engine_options import EngineOptions
    from nanorun.model.memory_needs import MemoryNeeds
    from nanorun.plan.plan import Plan, Wish

_MAX = "max"

log = logging.getLogger(__name__)


def parse_wish(
    n_ctx: str | None, *, default_n_ctx: int, kv: str | None = None, **given: Any
) -> Wish:
    """The wish that flags express.

    Args:
        n_ctx: The text of `--n-ctx`; None for `default_n_ctx`.
        default_n_ctx: Tokens of context unless the flag says otherwise.
        kv: The text of `--kv`.
        given: Other fields of the wish.

    Raises:
        UsageError: If one of them cannot be meant.
    """
    from nanorun.model.ggml_type import GgmlType
    from nanorun.model.units import parse_count
    from nanorun.plan.memory_plan import KV_TYPES
    from nanorun.plan.plan import Wish

    if n_ctx is None:
        tokens: int | None = default_n_ctx
    else:
        tokens = None if n_ctx.strip().lower() == _MAX else parse_count(n_ctx)
    type_kv = None if kv is None else GgmlType.from_name(kv)
    if type_kv is not None and type_kv not in KV_TYPES:
        names = ", ".join(t.label for t in KV_TYPES)
        raise UsageError(f"--kv {kv}: a KV cache is one of {names}")
    return Wish(n_ctx=tokens, type_kv=type_kv, **given)


@dataclass(frozen=True, slots=True)
class Opening:
    """How a command opens its engine."""

    options: EngineOptions
    smaller: tuple[tuple[EngineOptions, str], ...]
    """What to try, one after the other, when memory runs out, each with what it changes."""
    needs: MemoryNeeds
    """What the engine's process is to take of main memory, however it is opened."""


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
    fixed: EngineOptions,
    leave: str | None = None,
    keeps_texts: bool = False,
) -> Opening:
    """How a command opens a file on this machine, and what it falls back to.

    Args:
        model: What a person wrote as MODEL, for messages.
        path: The file that it stands for.
        n_ctx: The text of `--n-ctx`.
        command: The command, for suggestions.
        fixed: What the plan does not decide; see `Wish`.
        leave: The text of `--leave`.
        keeps_texts: Whether many conversations go on, as behind an endpoint; see `Wish`.

    Raises:
        UsageError: If the flags cannot be meant.
        ModelError: If the file is damaged or no model that nanorun runs.
        MemoryPlanError: If nothing fits.
    """
    from nanorun.model.units import parse_size
    from nanorun.plan.explain import decisions
    from nanorun.plan.machine.hardware import detect_hardware
    from nanorun.plan.memory_plan import plan_model
    from nanorun.plan.smaller import smaller_plans

    shape = shape_of_file(model, path)
    default = min(DEFAULT_N_CTX, shape.arch.n_ctx_train)
    cushion = None if leave is None else parse_size(leave)
    command = command if cushion is None else f"{command} --leave {cushion}"
    wish = parse_wish(
        n_ctx, default_n_ctx=default, command=command, keeps_texts=keeps_texts, fixed=fixed
    )
    plan = plan_model([shape], detect_hardware().restricted(leave=cushion), wish)
    for line in decisions(plan):
        log.debug("plan: %s", line)
    smaller = smaller_plans(plan)
    return Opening(
        options=plan.options,
        smaller=tuple((less.plan.options, less.change) for less in smaller),
        needs=_needs([plan, *(less.plan for less in smaller)], wish, model),
    )


def _needs(plans: Sequence[Plan], wish: Wish, model: str) -> MemoryNeeds:
    """What ways to open a model take of main memory; the last is the smallest."""
    from nanorun.model.memory_needs import MemoryNeeds

    words = re.sub(r" --leave \S+", "", wish.command)
    return MemoryNeeds(
        planned_bytes={p.options: p.uses[-1].total_bytes - p.uses[-1].checkpoint_bytes
                       for p in plans},
        weights_bytes=plans[-1].uses[-1].weights_bytes,
        leave_bytes=plans[0].hardware.host.cushion_bytes,
        again=f"nanorun {words} {shlex.quote(model)} --n-ctx {plans[-1].options.n_ctx}",
    )  # fmt: skip


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
        return f"{format_gib(opening.needs.of(options))} planned, {resident} resident"
    return None


def log_memory(opening: Opening, options: EngineOptions, pid: int | None) -> None:
    """Log `memory_facts` once the model has loaded."""
    if log.isEnabledFor(logging.DEBUG) and (facts := memory_facts(opening, options, pid)):
        log.debug("memory: %s after loading", facts)
