"""What a model takes on each device, opened with given options.

Every number is either exact (weights, KV cache, state, compute, output: the engine's own rules, see
`footprint` and `compute_graph`) or a stated allowance (driver, process, margin).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, replace
from itertools import accumulate

from nanorun.model.arch import LayerKind
from nanorun.model.engine_options import ALL_LAYERS, EngineOptions
from nanorun.model.footprint import kv_bytes, mtp_kv_bytes, output_bytes, padded_n_ctx, state_bytes
from nanorun.model.units import KIB, MIB
from nanorun.plan.graph.compute_graph import compute_bytes, input_bytes, mtp_compute_bytes
from nanorun.plan.machine.hardware import HOST, Accelerator, Hardware
from nanorun.plan.shape import ModelShape

# llama.cpp evaluates the next parts of a prompt while several devices still work on the last.
_N_PIPELINE_COPIES = 4
# A CUDA context, its kernels and cuBLAS's workspace.
DRIVER_BYTES = 400 * MIB
# An engine process with its libraries and Python; the vocabulary and its merges as objects.
PROCESS_BYTES = 110 * MIB
VOCABULARY_ENTRY_BYTES = 700


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    """What one device has to hold."""

    name: str
    weights_bytes: int = 0
    kv_bytes: int = 0
    state_bytes: int = 0
    checkpoint_bytes: int = 0
    compute_bytes: int = 0
    output_bytes: int = 0
    overhead_bytes: int = 0
    free_bytes: int = 0
    margin_bytes: int = 0
    """Kept free for what cannot be known: late allocations, other programs."""

    @property
    def total_bytes(self) -> int:
        """All that it holds, without the margin."""
        return (
            self.weights_bytes + self.kv_bytes + self.state_bytes + self.checkpoint_bytes
            + self.compute_bytes + self.output_bytes + self.overhead_bytes
        )  # fmt: skip

    @property
    def spare_bytes(self) -> int:
        """What is left; negative if it does not fit."""
        return self.free_bytes - self.margin_bytes - self.total_bytes

    def merged(self, other: DeviceUse) -> DeviceUse:
        """Both in one memory, under this one's name, free bytes and margin."""
        sums = {part: getattr(self, part) + getattr(other, part) for part in PARTS}
        return replace(self, **sums)


PARTS = (
    "weights_bytes", "kv_bytes", "state_bytes", "checkpoint_bytes",
    "compute_bytes", "output_bytes", "overhead_bytes",
)  # fmt: skip
"""The parts of a device's use, in the order in which they are shown."""


def device_uses(shape: ModelShape, options: EngineOptions, hardware: Hardware) -> list[DeviceUse]:
    """What each device holds, accelerators first; one entry where they share the host's memory."""
    gpus = hardware.accelerators if options.n_gpu_layers else ()
    placement = Placement(shape, options, gpus)
    uses = [_gpu_use(placement, i) for i in range(len(gpus))]
    host = _host_use(placement, hardware)
    if not hardware.is_unified or not uses:
        return [*uses, host]
    # One memory, counted once: its margin is the larger of both.
    pool = uses[0]
    for other in (*uses[1:], host):
        pool = pool.merged(other)
    return [
        replace(
            pool,
            free_bytes=min(gpus[0].free_bytes, host.free_bytes),
            margin_bytes=max(pool.margin_bytes, host.margin_bytes),
        )
    ]


class Placement:
    """Which layer is on which device: -1 is the host, others are indices of accelerators."""

    def __init__(
        self, shape: ModelShape, options: EngineOptions, gpus: tuple[Accelerator, ...]
    ) -> None:
        self.shape = shape
        self.arch = shape.arch
        self.options = options
        self.gpus = gpus
        self.device_of_layer = self._layers()
        self.weights: Counter[int] = Counter()
        self.read: Counter[int] = Counter()
        """Of the weights, the bytes that one token reads."""
        self._sum_up()

    def _sum_up(self) -> None:
        shape, n_layer = self.shape, self.arch.n_layer
        # The engine skips the MTP block unless it is asked to draft.
        n_loaded = self.arch.n_layer_all if self.options.with_mtp else n_layer
        for i, layer in enumerate(shape.layers[:n_loaded]):
            device = self.device_of_layer[i]
            for_experts = -1 if i < self.options.n_cpu_moe else device
            self.weights[device] += layer.rest
            self.weights[for_experts] += layer.experts
            if i < n_layer:
                self.read[device] += layer.rest
                self.read[for_experts] += layer.experts_read
        self.weights[-1] += shape.embedding_bytes
        self.weights[self.device_of_layer[-1]] += shape.output_bytes
        self.read[self.device_of_layer[-1]] += shape.output_bytes

    def _layers(self) -> list[int]:
        """Devices of all blocks, and of the output behind them (llama-model.cpp, load_tensors)."""
        n_all = self.arch.n_layer_all + 1
        n_gpu = self.options.n_gpu_layers
        n_gpu = n_all if n_gpu == ALL_LAYERS else min(n_gpu, n_all)
        if not self.gpus or not n_gpu:
            return [-1] * n_all
        sums = list(accumulate(gpu.free_bytes for gpu in self.gpus))
        splits = [part / max(1, sums[-1]) for part in sums]
        on_gpu = [min(bisect_right(splits, i / n_gpu), len(splits) - 1) for i in range(n_gpu)]
        return [-1] * (n_all - n_gpu) + on_gpu

    @property
    def experts_on_host(self) -> int:
        """Bytes of experts in main memory whose layers an accelerator evaluates."""
        return sum(
            layer.experts
            for i, layer in enumerate(self.shape.layers[: self.options.n_cpu_moe])
            if self.device_of_layer[i] >= 0
        )

    def share(self, device: int, kind: LayerKind) -> float:
        """The part of the trunk's layers of a kind that is on a device."""
        layers = [i for i, k in enumerate(self.arch.layers) if k is kind]
        on_device = sum(self.device_of_layer[i] == device for i in layers)
        return on_device / len(layers) if layers else 0.0

    @property
    def has_host_layers(self) -> bool:
        """Whether some layers are evaluated by the host."""
        return -1 in self.device_of_layer[:-1]

    @property
    def is_pipelined(self) -> bool:
        """Whether the engine overlaps devices, which copies the inputs (llama-context.cpp)."""
        is_whole = not self.has_host_layers and self.device_of_layer[-1] != -1
        return len(self.gpus) > 1 and is_whole and not self.options.n_cpu_moe

    def kv_bytes(self, device: int) -> int:
        """KV cache on a device, of the context that drafts too."""
        s = self.options
        trunk = kv_bytes(self.arch, s.n_ctx, s.type_k, s.type_v)
        n_bytes = round(trunk * self.share(device, LayerKind.ATTENTION))
        if s.with_mtp and self.device_of_layer[-1] == device:
            n_bytes += mtp_kv_bytes(self.arch, s.n_ctx, s.type_k, s.type_v)
        return n_bytes

    def state_bytes(self, device: int) -> int:
        """Recurrent states on a device."""
        s = self.options
        whole = state_bytes(self.arch, s.n_seq_max, s.n_rs_seq)
        return round(whole * self.share(device, LayerKind.SSM))

    def compute_bytes(self, *, on_gpu: bool) -> int:
        """Compute buffers of one device that evaluates layers."""
        n_bytes = compute_bytes(self.arch, self.options, on_gpu=on_gpu)
        if self.options.with_mtp:
            n_bytes += mtp_compute_bytes(self.arch, self.options, on_gpu=on_gpu)
        return n_bytes


def _gpu_use(placement: Placement, device: int) -> DeviceUse:
    options, gpu = placement.options, placement.gpus[device]
    compute = placement.compute_bytes(on_gpu=True)
    if placement.is_pipelined:
        compute += (_N_PIPELINE_COPIES - 1) * input_bytes(placement.arch, options)
    if options.n_cpu_moe:
        # Long prompts are evaluated on the device: a layer's experts are copied there for it.
        compute += placement.shape.largest_expert_bytes
    return DeviceUse(
        name=gpu.name,
        weights_bytes=placement.weights[device],
        kv_bytes=placement.kv_bytes(device),
        state_bytes=placement.state_bytes(device),
        compute_bytes=compute,
        overhead_bytes=DRIVER_BYTES,
        free_bytes=gpu.free_bytes,
        margin_bytes=gpu_margin_bytes(options),
    )


def _host_use(placement: Placement, hardware: Hardware) -> DeviceUse:
    options = placement.options
    compute = (
        placement.compute_bytes(on_gpu=False)
        if placement.has_host_layers or placement.weights[-1] == placement.weights.total()
        else input_bytes(placement.arch, options)
    )
    return DeviceUse(
        name=HOST,
        weights_bytes=placement.weights[-1],
        kv_bytes=placement.kv_bytes(-1),
        state_bytes=placement.state_bytes(-1),
        checkpoint_bytes=options.checkpoint_bytes + options.archive_bytes,
        compute_bytes=compute,
        # A head that drafts has logits of its own.
        output_bytes=output_bytes(
            placement.arch, options.n_outputs_max + options.n_seq_max * options.with_mtp
        ),
        overhead_bytes=PROCESS_BYTES + VOCABULARY_ENTRY_BYTES * placement.arch.n_vocab,
        free_bytes=hardware.host.available_bytes,
        margin_bytes=hardware.host.cushion_bytes,
    )


def gpu_margin_bytes(options: EngineOptions) -> int:
    """What stays free on an accelerator.

    Attention takes memory while it runs that no buffer size shows; people who filled the card ran
    out near a million tokens, about 1 KiB a token above what had been reserved.
    """
    return 256 * MIB + KIB * padded_n_ctx(options.n_ctx)
