"""The words of a plan: why each thing was decided, and what would help where nothing fits."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

from nanorun.model.arch import LayerKind
from nanorun.model.engine_options import ALL_LAYERS, EngineOptions
from nanorun.model.footprint import kv_bytes_per_token, state_bytes
from nanorun.model.ggml_type import GgmlType
from nanorun.model.units import MIB, format_gib
from nanorun.plan.graph.compute_graph import mask_bytes
from nanorun.plan.machine.hardware import Hardware
from nanorun.plan.memory_use import DRIVER_BYTES, DeviceUse
from nanorun.plan.plan import Plan, Wish
from nanorun.plan.shape import EXPERT_ROLES, ModelShape

_CONFIG_N_CTX = 262144


def decisions(plan: Plan) -> list[str]:
    """One line for each decision of a plan."""
    return [
        _recipe(plan), _placement(plan), _context(plan), _kv(plan), _ubatch(plan),
        _sequences(plan), _checkpoints(plan), _allowances(plan), *_limits(plan),
    ]  # fmt: skip


def _recipe(plan: Plan) -> str:
    shape = plan.shape
    size = format_gib(shape.weights_bytes)
    if shape.recipe is None:
        return f"weights: {size} as they are in the file, {shape.bpw:.2f} bits a weight"
    return f"recipe {shape.recipe}: {size}, {shape.bpw:.2f} bits a weight, {plan.recipe_reason}"


def _placement(plan: Plan) -> str:
    options, names = plan.options, [gpu.name for gpu in plan.hardware.accelerators]
    if not names:
        return "device: CPU, there is no accelerator that the engine could use"
    if options.n_gpu_layers == 0:
        return f"device: CPU, {' and '.join(names)} cannot hold even a part of the layers"
    where = " and ".join(names)
    if options.n_gpu_layers != ALL_LAYERS:
        return f"placement: the last {options.n_gpu_layers} layers on {where}, the rest on the CPU"
    if options.n_cpu_moe:
        n_blocks = len(_blocks_on_host(plan))
        return (
            f"placement: experts of {n_blocks} layers (blocks below {options.n_cpu_moe}) in main"
            f" memory, everything else on {where}; fewer did not fit"
        )
    return f"placement: all layers on {where}"


def _blocks_on_host(plan: Plan) -> set[int]:
    return {
        t.i_layer
        for t in plan.shape.tensors
        if t.role in EXPERT_ROLES
        and t.i_layer is not None
        and t.i_layer < min(plan.options.n_cpu_moe, plan.shape.arch.n_layer)
    }


def _context(plan: Plan) -> str:
    n_ctx = plan.options.n_ctx
    asked = plan.wish.n_ctx
    if asked is None:
        is_all = n_ctx == plan.shape.arch.n_ctx_train
        reason = "all that the model was trained for" if is_all else "the longest that fits"
    elif asked != n_ctx:
        reason = f"as asked ({asked:,}), rounded up to a multiple of 256"
    else:
        reason = "as asked"
    return f"n_ctx {n_ctx:,}: {reason}"


def _kv(plan: Plan) -> str:
    arch, options = plan.shape.arch, plan.options
    per_token = kv_bytes_per_token(arch, options.type_k, options.type_v)
    n_layers = arch.n_layers_of(LayerKind.ATTENTION)
    line = (
        f"KV cache {options.type_k.label}: {per_token:,} bytes a token in {n_layers} layers"
        " of attention"
    )
    if plan.wish.type_kv is not None:
        return f"{line}, as asked"
    if options.type_k is GgmlType.F16:
        return f"{line}; it fits without quantizing"
    return f"{line}; f16 would take {kv_bytes_per_token(arch):,} and did not fit as well"


def _ubatch(plan: Plan) -> str:
    n_ubatch, n_ctx = plan.options.n_ubatch, plan.options.n_ctx
    mask = format_gib(mask_bytes(n_ctx, n_ubatch))
    line = f"n_ubatch {n_ubatch}: the attention mask of a batch takes {mask} at this n_ctx"
    return line if n_ubatch >= 512 else f"{line}; larger batches did not fit as well"


def _sequences(plan: Plan) -> str:
    options = plan.options
    each = format_gib(state_bytes(plan.shape.arch))
    return (
        f"n_seq_max {options.n_seq_max}: {options.n_parallel} at a time and"
        f" {options.n_seq_spare} spare that keep finished prompts, {each} of state each"
    )


def _checkpoints(plan: Plan) -> str:
    options = plan.options
    n_states = options.checkpoint_bytes // max(1, state_bytes(plan.shape.arch))
    return (
        f"checkpoints: room for {n_states} states"
        f" ({format_gib(options.checkpoint_bytes)}) and {format_gib(options.archive_bytes)}"
        " of conversations in main memory"
    )


def _allowances(plan: Plan) -> str:
    margins = ", ".join(f"{u.name} {format_gib(u.margin_bytes)}" for u in plan.uses)
    driver = f" (with {format_gib(DRIVER_BYTES)} for the driver)"
    on_gpu = bool(plan.hardware.accelerators) and plan.options.n_gpu_layers != 0
    why = " as asked" if plan.hardware.host.leave_bytes is not None else "; --leave SIZE changes it"
    return f"kept free{driver if on_gpu else ''}: {margins}; main memory for other programs{why}"


def _limits(plan: Plan) -> list[str]:
    hardware, lines = plan.hardware, []
    if hardware.disk_bandwidth:
        load_s = plan.shape.weights_bytes / hardware.disk_bandwidth
        rate = hardware.disk_bandwidth / 1e9
        lines.append(f"loading: about {load_s:.0f} s from a disk that reads {rate:.1f} GB/s")
    if hardware.host.limit:
        lines.append(f"main memory: {hardware.host.limit}")
    if hardware.is_unified:
        lines.append("CPU and accelerator share one memory, which is counted once")
    lines += [f"{gpu.description} is not used: see `nanorun doctor`" for gpu in hardware.unusable]
    lines += [f"{fault}: see `nanorun doctor`" for fault in hardware.faults if fault.costs_gpu]
    return lines


def shortfall(use: DeviceUse, options: EngineOptions, hardware: Hardware) -> list[str]:
    """What takes the memory that is not there."""
    parts = " + ".join(
        f"{name} {format_gib(n_bytes)}"
        for name, n_bytes in (
            ("weights", use.weights_bytes),
            (f"KV cache {options.type_k.label}", use.kv_bytes),
            ("SSM state", use.state_bytes),
            ("checkpoints", use.checkpoint_bytes),
            ("compute", use.compute_bytes),
            ("output", use.output_bytes),
            ("process", use.overhead_bytes),
        )
        if n_bytes
    )
    facts = [parts, f"{format_gib(use.margin_bytes)} are kept free"]
    for gpu in hardware.accelerators:
        if not gpu.is_unified:
            facts.append(f"{gpu.name} has {format_gib(gpu.free_bytes)} free, too little to help")
    if hardware.host.limit:
        facts.append(hardware.host.limit)
    return facts


def what_would_help(
    shape: ModelShape,
    wish: Wish,
    longest: int | None,
    *,
    has_choice: bool,
    fits: Callable[[Wish], bool],
    cushion: int | None = None,
) -> list[str]:
    """Commands that may work, nearest to the wish first; the last ones need another machine.

    Args:
        shape: The model, in the smallest recipe that was considered.
        wish: What was asked.
        longest: The longest context that would fit.
        has_choice: Whether more than one recipe was considered.
        fits: Whether this machine has room for the model with another wish.
        cushion: Bytes that would be left to other programs if the wish were met all the same;
            None where it cannot be.
    """
    again = f"nanorun {wish.command} {shlex.quote(shape.name)}"
    n_ctx = wish.n_ctx or "max"
    tries: list[str] = []
    if longest and wish.n_ctx and longest < wish.n_ctx:
        tries.append(f"{again} --n-ctx {longest}")
    if cushion is not None:
        # What the command says of it already gives way.
        less = re.sub(r" --leave \S+", "", again)
        tries.append(f"{less} --n-ctx {n_ctx} --leave {cushion // MIB}M")
    if wish.type_kv is GgmlType.F16:
        smaller = (GgmlType.Q8_0, GgmlType.Q4_0)
        fitting = (kv for kv in smaller if fits(replace(wish, type_kv=kv)))
        tries += [f"{again} --n-ctx {n_ctx} --kv {kv.label}" for kv in islice(fitting, 1)]
    if not has_choice and shape.repository:
        # Planned anew from its source, the model gets the recipe that fits.
        command = wish.command if wish.command.startswith("plan") else "plan"
        tries.append(f"nanorun {command} {shlex.quote(shape.repository)} --n-ctx {n_ctx}")
    alone = replace(wish, fixed=replace(wish.fixed, n_parallel=1))
    if wish.fixed.n_parallel > 1 and fits(alone):
        tries.append(f"{again} --n-ctx {n_ctx} --parallel 1")
    if shape.name != "nano-4b":
        tries.append("nanorun plan nano-4b")
    if shape.repository:
        tries.append(vllm_command(shape, wish))
        tries.append("nanorun chat --endpoint http://THAT-MACHINE:8000")
    else:
        tries.append("nanorun chat --endpoint http://OTHER-MACHINE:8080")
    return tries


def vllm_command(shape: ModelShape, wish: Wish) -> str:
    """What serves the source model with vLLM, on a machine that holds it."""
    n_ctx = wish.n_ctx or shape.arch.n_ctx_train
    command = (
        f"vllm serve {shape.repository} --max-model-len {n_ctx}"
        f" --max-num-seqs {wish.fixed.n_parallel} --trust-remote-code"
        " --reasoning-parser nemotron_v3 --enable-auto-tool-choice --tool-call-parser qwen3_coder"
    )
    # NVIDIA's config.json names a quarter of what the models were trained for.
    return f"VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 {command}" if n_ctx > _CONFIG_N_CTX else command
