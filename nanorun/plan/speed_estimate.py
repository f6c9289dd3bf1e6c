"""Tokens per second, from the bytes and operations that one token costs.

A decoded token reads every weight it uses once: the experts that it is routed to, not all. That,
the cache and the states, over the bandwidth of the memory they lie in, and a little time a layer
to start work on it, is what decoding takes. Prefill is bound by arithmetic, and by reading all
experts once a batch. Calibrated by a measurement of this machine where there is one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from nanorun.model.arch import HybridArch, LayerKind
from nanorun.model.engine_options import EngineOptions
from nanorun.model.footprint import kv_bytes_per_token, state_bytes
from nanorun.plan.machine.hardware import Hardware
from nanorun.plan.memory_use import Placement
from nanorun.plan.shape import ModelShape

# Of the bandwidth on paper, what decoding gets; fitted to published speeds of Nemotron-H models
# on RTX 3090 to 5090 (reference: 187 to 229 t/s) and DGX Spark (Super: 19.9 t/s).
_GPU_EFFICIENCY = 0.85
_UNIFIED_EFFICIENCY = 0.70
_HOST_EFFICIENCY = 0.70
_GPU_LAYER_S = 55e-6
_HOST_LAYER_S = 20e-6
# Of the bandwidth that weights get, what attention gets over a long cache (RTX 4090: 98 t/s at
# 256K, 60 at 508K).
_KV_SHARE = 0.4
# Of the operations on paper, what prefill gets: small experts keep matrix units half empty.
_GPU_FLOPS_SHARE = 0.12
# What a core gives without any measurement: four-bit kernels with AVX2 or AVX-512.
_CORE_BANDWIDTH = 11e9
_HOST_BANDWIDTH_LIMIT = 45e9
_CORE_FLOPS = 100e9
_GPU_BANDWIDTH = 300e9
_GPU_FLOPS = 40e12
_PCIE_BANDWIDTH = 16e9


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a slice of the model's shape reached on this machine, in the same types."""

    decode_bandwidth: float
    """Bytes of weights and states that decoding got through per second."""
    prefill_flops: float
    """Operations per second of prefill."""


@dataclass(frozen=True, slots=True)
class SpeedEstimate:
    """Speeds with an empty context, and how sure they are."""

    decode_tps: float
    prefill_tps: float
    uncertainty: float
    """0.25 means a quarter more or less."""

    def render(self) -> str:
        """`decode 96 to 160 t/s, prefill 2100 to 3500 t/s`."""
        decode, prefill = self._range(self.decode_tps), self._range(self.prefill_tps)
        return f"decode {decode} t/s, prefill {prefill} t/s"

    def _range(self, value: float) -> str:
        low, high = value / (1 + self.uncertainty), value * (1 + self.uncertainty)
        return f"{_rounded(low)} to {_rounded(high)}"


def estimate_speed(
    shape: ModelShape,
    options: EngineOptions,
    hardware: Hardware,
    *,
    calibration: Calibration | None = None,
    n_past: int = 0,
) -> SpeedEstimate:
    """Decode and prefill speed of one sequence.

    Args:
        shape: The model.
        options: Where its layers are.
        hardware: The machine.
        calibration: A measurement of the device that evaluates the layers, if there is one.
        n_past: Tokens that are in the context already.
    """
    gpus = hardware.accelerators if options.n_gpu_layers else ()
    placement = Placement(shape, options, gpus)
    work = _work(placement, options, n_past)
    decode_s = sum(
        work[device] / _bandwidth(hardware, device, calibration)
        + placement.device_of_layer[:-1].count(device) * _layer_s(device, calibration)
        for device in {*work, *placement.device_of_layer}
    )
    return SpeedEstimate(
        decode_tps=1 / decode_s,
        prefill_tps=1 / _prefill_s(placement, options, hardware, calibration),
        uncertainty=_uncertainty(hardware, bool(gpus), calibration),
    )


def decode_bytes(shape: ModelShape, options: EngineOptions, n_past: int = 0) -> int:
    """Bytes that a decoded token reads and writes, wherever they lie."""
    return sum(_work(Placement(shape, options, ()), options, n_past).values())


def prefill_flops_per_token(arch: HybridArch) -> float:
    """Multiplications and additions that a token of a prompt costs, with little before it."""
    experts = sum(
        2 * arch.n_expert_used_at(i) * arch.n_ff_exp_at(i) * arch.n_embd_exp
        for i, kind in enumerate(arch.layers)
        if kind is LayerKind.MOE
    )
    n_moe, n_ssm = arch.n_layers_of(LayerKind.MOE), arch.n_layers_of(LayerKind.SSM)
    n_attention = arch.n_layers_of(LayerKind.ATTENTION)
    shared = n_moe * arch.n_embd * (2 * arch.n_ff_shexp + arch.n_expert + 2 * arch.n_latent)
    dense = arch.n_layers_of(LayerKind.MLP) * 2 * arch.n_embd * arch.n_ff
    ssm = n_ssm * (
        arch.n_embd * (arch.ssm_d_in_proj + arch.ssm_d_inner)
        + 3 * arch.ssm_d_state * arch.ssm_d_inner
    )
    attention = n_attention * 2 * arch.n_embd * (arch.n_embd_q + arch.n_embd_gqa)
    return 2.0 * (experts + shared + dense + ssm + attention)


def _work(placement: Placement, options: EngineOptions, n_past: int) -> Counter[int]:
    """Bytes a decoded token moves, by device."""
    arch, work = placement.arch, Counter(placement.read)
    kv = kv_bytes_per_token(arch, options.type_k, options.type_v) * n_past / _KV_SHARE
    states = 2 * state_bytes(arch)  # read and written
    for device in set(placement.device_of_layer):
        work[device] += round(kv * placement.share(device, LayerKind.ATTENTION))
        work[device] += round(states * placement.share(device, LayerKind.SSM))
    return work


def _prefill_s(
    placement: Placement,
    options: EngineOptions,
    hardware: Hardware,
    calibration: Calibration | None,
) -> float:
    """Seconds a token of a long prompt takes."""
    flops = prefill_flops_per_token(placement.arch)
    if not placement.gpus or placement.has_host_layers:
        return flops / (calibration.prefill_flops if calibration else _host_flops(hardware))
    gpu = placement.gpus[0]
    compute_s = flops / ((gpu.flops or _GPU_FLOPS) * _GPU_FLOPS_SHARE)
    # Each batch reads every weight of the device once, and brings the host's experts over.
    n_batch = options.n_ubatch
    on_gpu = sum(n for device, n in placement.weights.items() if device >= 0)
    read_s = on_gpu / (_gpu_bandwidth(hardware, 0)) / n_batch
    return compute_s + read_s + placement.experts_on_host / _PCIE_BANDWIDTH / n_batch


def _host_flops(hardware: Hardware) -> float:
    return hardware.host.flops or hardware.host.n_cores * _CORE_FLOPS


def _bandwidth(hardware: Hardware, device: int, calibration: Calibration | None) -> float:
    if device >= 0:
        return _gpu_bandwidth(hardware, device)
    if calibration is not None:
        return calibration.decode_bandwidth
    host = hardware.host
    by_cores = host.n_cores * _CORE_BANDWIDTH
    return min(by_cores, host.bandwidth * _HOST_EFFICIENCY or _HOST_BANDWIDTH_LIMIT)


def _gpu_bandwidth(hardware: Hardware, device: int) -> float:
    gpu = hardware.accelerators[device]
    share = _UNIFIED_EFFICIENCY if gpu.is_unified else _GPU_EFFICIENCY
    return (gpu.bandwidth or _GPU_BANDWIDTH) * share


def _layer_s(device: int, calibration: Calibration | None) -> float:
    if device >= 0:
        return _GPU_LAYER_S
    # A measured slice has paid for its layers.
    return 0.0 if calibration else _HOST_LAYER_S


def _uncertainty(hardware: Hardware, on_gpu: bool, calibration: Calibration | None) -> float:
    if on_gpu:
        return 0.3 if hardware.accelerators[0].bandwidth else 1.0
    return 0.2 if calibration else 0.8


def _rounded(value: float) -> str:
    if value >= 100:
        step = 10 if value < 1000 else 100
        return f"{round(value / step) * step}"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
