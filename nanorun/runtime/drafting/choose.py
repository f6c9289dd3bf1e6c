"""Which drafter the options ask for, and the memory that it needs."""

from __future__ import annotations

from nanorun.errors import UsageError
from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.drafting.drafter import Drafter, NoDrafts
from nanorun.runtime.drafting.head_memory import HeadMemory
from nanorun.runtime.drafting.lookup import LookupDrafter
from nanorun.runtime.drafting.mtp import MtpDrafter
from nanorun.runtime.llama.context import Context
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.prompt_state.memory import Memory


def choose_drafter(context: Context, options: EngineOptions) -> tuple[Memory, Drafter]:
    """Where sequences are kept, and who guesses how they go on."""
    if options.speculation == "mtp":
        memory = HeadMemory(context, options)
        return memory, MtpDrafter(memory)
    return context, LookupDrafter() if options.speculation == "lookup" else NoDrafts()


def check_speculation(model: LoadedModel, options: EngineOptions) -> None:
    """Refuse what would make the engine abort.

    Raises:
        UsageError: If the options cannot be meant for this model.
    """
    if options.speculation not in ("off", "lookup", "mtp"):
        raise UsageError(
            f"speculation {options.speculation!r} is not known",
            facts=["it is off, lookup or mtp"],
        )
    if options.speculation != "off" and not 1 <= options.n_draft <= 16:
        raise UsageError(f"n_draft {options.n_draft} is not between 1 and 16")
    if options.speculation == "mtp" and not model.arch.n_layer_nextn:
        raise UsageError(
            f"{model.path.name} has no MTP head",
            facts=["prompt lookup needs none"],
            tries=[f"nanorun run {model.path} --draft lookup"],
        )
