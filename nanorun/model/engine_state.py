"""What becomes of a request that comes now: what `/health` tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["loading", "ready", "unloaded", "failed"]


@dataclass(frozen=True, slots=True)
class EngineState:
    """Whether the engine can answer."""

    phase: Phase
    """`unloaded`: the next request loads the model. `failed`: the next request fails."""
    since: float
    """Seconds since the epoch."""
    progress: float | None = None
    """While it loads, the part of the weights that is read, 0 to 1."""
    reason: str | None = None
    """Why it failed, or why it was ended before it was unloaded."""
