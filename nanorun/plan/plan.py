"""What is asked of a memory plan, and the plan that answers it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from nanorun.model.engine_options import EngineOptions
from nanorun.model.ggml_type import GgmlType
from nanorun.plan.machine.hardware import Hardware
from nanorun.plan.memory_use import DeviceUse, device_uses
from nanorun.plan.shape import ModelShape
from nanorun.plan.speed_estimate import Calibration, SpeedEstimate, estimate_speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a person asks of a plan."""

    n_ctx: int | None = None
    """Tokens of context; None for the longest that fits (`max`)."""
    type_kv: GgmlType | None = None
    """Type of the KV cache; None leaves the choice to the plan."""
    keeps_texts: bool = False
    """Whether the context is to hold many conversations. They share its cells, so it may be longer
    than the model was trained for, which is a limit for each of them."""
    fixed: EngineOptions = field(default_factory=lambda: EngineOptions(n_parallel=1))
    """How the model is opened in every respect that the plan does not decide (`DECIDED`)."""
    command: str = "plan"
    """The command that has the wish, with the flags that suggestions should keep."""


DECIDED = frozenset(
    {
        "n_ctx", "n_seq_spare", "n_batch", "n_ubatch", "type_k", "type_v",
        "n_gpu_layers", "n_cpu_moe", "checkpoint_bytes", "archive_bytes",
    }
)  # fmt: skip
"""Fields of `EngineOptions` that a plan decides; it passes the others on from `Wish.fixed`."""


@dataclass(frozen=True)
class Plan:
    """Options that fit a machine, and what they come to."""

    shape: ModelShape
    options: EngineOptions
    hardware: Hardware
    wish: Wish
    calibration: Calibration | None = None
    recipe_reason: str = "as asked"

    @cached_property
    def uses(self) -> list[DeviceUse]:
        """What each device holds."""
        return device_uses(self.shape, self.options, self.hardware)

    @cached_property
    def speed(self) -> SpeedEstimate:
        """Expected speed."""
        return estimate_speed(self.shape, self.options, self.hardware, calibration=self.calibration)
