"""How an engine is opened. The memory plan fills these; a flag overrides one of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Sizes of one opened model, in llama.cpp's own words."""

    n_ctx: int = 8192
    """KV cells, shared by all sequences; llama.cpp rounds it up to a multiple of 256."""
    n_parallel: int = 4
    """Requests that may run at the same time."""
    n_seq_spare: int = 4
    """Sequences beyond `n_parallel` that keep finished prompts in device memory."""
    n_batch: int = 512
    n_ubatch: int = 512
    n_threads: int | None = None
    """Threads of the engine; None for the physical cores."""
    n_gpu_layers: int = -1
    """Layers on the GPU; -1 for all."""
    n_cpu_moe: int = 0
    """Blocks, counted from the first, whose routed experts stay in main memory. Blocks without
    experts count as well: that is how the engine numbers them."""
    type_k: str = "f16"
    type_v: str = "f16"
    checkpoint_bytes: int = 2**30
    """Host memory for recurrent states saved along the sequences."""
    archive_bytes: int = 2 * 2**30
    """Host memory for sequences that left the device."""
    state_dir: str | None = None
    """Folder where conversations' states outlive the process; None to keep none."""
    state_bytes: int = 8 * 2**30
    """Disk they may take."""
    speculation: str = "off"
    """What guesses tokens ahead: `off`, `lookup` (earlier text) or `mtp` (the model's own head)."""
    n_draft: int = 3
    """Most tokens to guess; each costs a recurrent state more a sequence."""
    verbose: bool = False
    """Let the engine's log through to stderr."""
    read_ahead: bool = True
    """Evaluate the known part of the next turn while nothing else runs."""

    @property
    def n_rs_seq(self) -> int:
        """Planes of recurrent state a sequence, beside the current one, for taking back guesses."""
        return 0 if self.speculation == "off" else self.n_draft

    @property
    def n_seq_max(self) -> int:
        """Sequences of the context; each costs one recurrent state on the device."""
        return self.n_parallel + self.n_seq_spare
