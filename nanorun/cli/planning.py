"""From MODEL and flags to shapes, hardware and wish; the one place where commands get a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nanorun.errors import ModelError, UsageError

if TYPE_CHECKING:
    from nanorun.model.arch import HybridArch
    from nanorun.plan.hardware import Hardware
    from nanorun.plan.memory_plan import Plan, Wish
    from nanorun.plan.shape import ModelShape
    from nanorun.runtime.options import EngineOptions

MAX_N_CTX = "max"


def shapes_of_model(model: str, recipe: str | None = None) -> list[ModelShape]:
    """The shapes that MODEL may have: one for a file, one a recipe for what is to be converted.

    Args:
        model: Path of a GGUF file, folder of a source model, or library name; no name but that of
            the bundled model needs anything on this machine.
        recipe: The recipe to take; None for all that may be chosen from.

    Raises:
        UsageError: If there is no such model or recipe.
        ModelError: If the model cannot be used, or its shape is not known.
    """
    from nanorun.library import BUNDLED_MODEL, CATALOG, resolve_model
    from nanorun.model.gguf import read_gguf
    from nanorun.plan.shape import shape_of_gguf

    name, _, size = model.partition(":")
    if model not in CATALOG and (Path(model) / "config.json").is_file():
        return _of_source(Path(model), recipe)
    if name in CATALOG and name != BUNDLED_MODEL:
        known = CATALOG[name]
        if known.arch is None:
            raise ModelError(
                f"the shape of {name} is not known without its files",
                facts=[known.summary],
                tries=[f"hf download {known.repository} config.json --local-dir {name}",
                       f"nanorun plan {name}"],
            )  # fmt: skip
        return _of_arch(model, known.arch, recipe or size or None, known.repository)
    if recipe is not None:
        raise UsageError(
            f"--recipe {recipe} is for models that are still to be converted; {model} is a file",
            tries=[f"nanorun plan {model}"],
        )
    return [shape_of_gguf(model, read_gguf(resolve_model(model)))]


def _of_source(folder: Path, recipe: str | None) -> list[ModelShape]:
    import json

    from nanorun_converters.config import arch_from_config

    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected an object, found {type(config).__name__}")
    return _of_arch(str(folder), arch_from_config(config, str(path)), recipe, None)


def _of_arch(
    name: str, arch: HybridArch, recipe: str | None, repository: str | None
) -> list[ModelShape]:
    from nanorun.plan.shape import shape_of_recipe, shapes_of_recipes

    if recipe is not None:
        return [shape_of_recipe(name, arch, recipe, repository)]
    return shapes_of_recipes(name, arch, repository)


def parse_wish(
    n_ctx: str | None,
    *,
    default_n_ctx: int,
    n_parallel: int = 1,
    kv: str | None = None,
    n_ubatch: int | None = None,
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
        tokens = None if n_ctx.strip().lower() == MAX_N_CTX else parse_count(n_ctx)
    type_kv = None if kv is None else GgmlType.from_name(kv)
    if type_kv is not None and type_kv not in KV_TYPES:
        names = ", ".join(t.label for t in KV_TYPES)
        raise UsageError(f"--kv {kv}: a KV cache is one of {names}")
    return Wish(n_ctx=tokens, n_parallel=n_parallel, type_kv=type_kv, n_ubatch=n_ubatch)


def engine_options(plan: Plan) -> EngineOptions:
    """The options that open an engine as planned."""
    from nanorun.runtime.options import EngineOptions

    s = plan.settings
    return EngineOptions(
        n_ctx=s.n_ctx, n_parallel=s.n_parallel, n_seq_spare=s.n_seq_spare, n_batch=s.n_ubatch,
        n_ubatch=s.n_ubatch, n_gpu_layers=s.n_gpu_layers, type_k=s.type_k.label,
        type_v=s.type_v.label, checkpoint_bytes=s.checkpoint_bytes, archive_bytes=s.archive_bytes,
    )  # fmt: skip


def plan_engine_options(path: Path, wish: Wish, hardware: Hardware | None = None) -> EngineOptions:
    """How to open a file on a machine, this one if none is given.

    Raises:
        UsageError: If the wish cannot be meant.
        ModelError: If the file is damaged or no model that nanorun runs.
        MemoryPlanError: If nothing fits.
    """
    from nanorun.plan.hardware import detect_hardware
    from nanorun.plan.memory_plan import plan_model

    hardware = hardware or detect_hardware()
    # Whole layers only: `EngineOptions` cannot say yet that experts stay on the host.
    wish = replace(wish, may_split_experts=False)
    return engine_options(plan_model(shapes_of_model(str(path)), hardware, wish))
