"""How a model is opened: the memory plan chooses these sizes, and the engine takes them."""

from __future__ import annotations

from dataclasses import dataclass

from nanorun.model.ggml_type import GgmlType

ALL_LAYERS = -1
"""`n_gpu_layers` for every layer, and the output behind them."""


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
    n_gpu_layers: int = ALL_LAYERS
    """Layers on accelerators, the last ones first and the output with them."""
    n_cpu_moe: int = 0
    """Blocks, counted from the first, whose routed experts stay in main memory. Blocks without
    experts count as well: that is how the engine numbers them."""
    type_k: GgmlType = GgmlType.F16
    type_v: GgmlType = GgmlType.F16
    checkpoint_bytes: int = 2**30
    """Host memory for recurrent states saved along the sequences."""
    archive_bytes: int = 2 * 2**30
    """Host memory for sequences that left the device."""
    state_dir: str | None = None
    """Folder where conversations' states outlive the process; None to keep none."""
    state_bytes: int = 8 * 2**30
    """Most bytes of disk for the states in `state_dir`."""
    speculation: str = "off"
    """What guesses tokens ahead: `off`, `lookup` (earlier text) or `mtp` (the model's own head)."""
    n_draft: int = 3
    """Most tokens to guess; each costs a recurrent state more a sequence."""
    verbose: bool = False
    """Let the engine's log through to stderr."""
    read_ahead: bool = True
    """Evaluate the known part of the next turn while nothing else runs."""

    def __post_init__(self) -> None:
        # Options reach the engine's process as JSON, which turns the types into their numbers.
        for name in ("type_k", "type_v"):
            object.__setattr__(self, name, GgmlType(getattr(self, name)))

    @property
    def with_mtp(self) -> bool:
        """Whether the model's MTP head is loaded, with a context of its own."""
        return self.speculation == "mtp"

    @property
    def n_rs_seq(self) -> int:
        """Planes of recurrent state a sequence, beside the current one, for taking back guesses."""
        return 0 if self.speculation == "off" else self.n_draft

    @property
    def n_seq_max(self) -> int:
        """Sequences of the context; each costs one recurrent state on the device."""
        return self.n_parallel + self.n_seq_spare

    @property
    def n_outputs_max(self) -> int:
        """Rows of logits of one decode: each sequence's next token, and its guesses."""
        return self.n_seq_max * (1 + self.n_rs_seq)
