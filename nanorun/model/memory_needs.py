"""What an engine takes of main memory, as far as its client must know to start it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nanorun.model.engine_options import EngineOptions


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """What a plan says of main memory.

    Weights are counted once, whether they are mapped or copied: the file's pages in the kernel's
    cache count as available before a load, and are what is mapped, or what gives way to the copy.
    """

    planned_bytes: Mapping[EngineOptions, int] = field(default_factory=dict)
    """What the engine's process takes so opened, before any prompt is saved."""
    weights_bytes: int = 0
    """What of it no smaller plan gives up."""
    leave_bytes: int = 0
    """What is left to other programs."""
    again: str = ""
    """The command that has these needs, for suggestions; empty where nobody typed one."""

    def of(self, options: EngineOptions) -> int:
        """Bytes of one way to open the model; 0 where nobody planned it."""
        return self.planned_bytes.get(options, 0)
