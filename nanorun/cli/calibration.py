"""A measurement of this machine's speed on a model that is not there yet.

A slice of the model's shape, a few layers of full width in the types that the whole will have, is
made up, loaded and timed for about two seconds. What it got through per second stands for the whole
model, and is kept for later plans.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from nanorun.cli.benchmarks import keep_measurement, known_measurement
from nanorun.model.arch import HybridArch, LayerKind
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import Role, expected_tensors, role_of

if TYPE_CHECKING:
    from nanorun.plan.machine.hardware import Hardware
    from nanorun.plan.shape import ModelShape
    from nanorun.plan.speed_estimate import Calibration
    from nanorun_converters.output.gguf_header import Layout

_N_LAYERS = 12
_N_VOCAB = 4096
# A quarter of the experts and of the batch: as many tokens meet at an expert as in the whole.
_FEWER = 4
_N_UBATCH = 128
_N_FILL = 256


def known_speed(shape: ModelShape, hardware: Hardware) -> Calibration | None:
    """What was measured before on this machine with these types, if anything."""
    from nanorun.plan.speed_estimate import Calibration

    with suppress(TypeError):
        found = known_measurement(_key(shape, hardware))
        return None if found is None else Calibration(**found)
    return None


def measure_speed(shape: ModelShape, hardware: Hardware) -> Calibration:
    """Time a slice of the model on this machine's processor, and keep the result.

    Raises:
        EngineError: If the engine cannot run it.
        NanorunError: If the slice cannot be written.
    """
    from nanorun.model.engine_options import EngineOptions
    from nanorun.model.gguf import read_gguf
    from nanorun.plan.shape import shape_of_gguf
    from nanorun.plan.speed_estimate import (
        Calibration,
        decode_bytes,
        prefill_flops_per_token,
    )
    from nanorun.runtime.measure.probe import measure
    from nanorun_converters.opened.shape_file import write_shape

    arch = slice_of(shape.arch)
    by_role = _types_of_roles(shape)
    types = {s.name: by_role.get(s.role, GgmlType.F32) for s in expected_tensors(arch).values()}
    options = EngineOptions(
        n_ctx=1024, n_parallel=1, n_seq_spare=0, n_batch=_N_UBATCH, n_ubatch=_N_UBATCH,
        n_threads=hardware.host.n_cores, n_gpu_layers=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="nanorun-") as folder:
        path = Path(folder) / "slice.gguf"
        _enliven(path, write_shape(path, arch, types))
        sliced = shape_of_gguf("slice", read_gguf(path))
        measured = measure(path, options, _N_FILL)
    found = Calibration(
        decode_bandwidth=decode_bytes(sliced, options) * measured.decode_tps,
        prefill_flops=prefill_flops_per_token(arch) * measured.prefill_tps,
    )
    keep_measurement(_key(shape, hardware), asdict(found))
    return found


def slice_of(arch: HybridArch) -> HybridArch:
    """A few layers of full width, in about the proportions of the whole."""
    kinds = tuple(arch.layers[:_N_LAYERS])
    n_used = max(arch.n_expert_used, *arch.n_expert_used_per_layer, 0)
    n_expert = max(arch.n_expert // _FEWER, n_used)
    has_experts = LayerKind.MOE in kinds
    return replace(
        arch, layers=kinds, n_vocab=_N_VOCAB, n_layer_nextn=0,
        n_expert=n_expert if has_experts else 0,
        n_ff_exp_per_layer=arch.n_ff_exp_per_layer[:_N_LAYERS],
        n_expert_used_per_layer=arch.n_expert_used_per_layer[:_N_LAYERS],
    )  # fmt: skip


def _types_of_roles(shape: ModelShape) -> Mapping[Role, GgmlType]:
    """The type that most bytes of each role have."""
    counts: dict[Role, Counter[GgmlType]] = {}
    for tensor in shape.tensors:
        counts.setdefault(tensor.role, Counter())[tensor.type] += tensor.n_bytes
    return {role: types.most_common(1)[0][0] for role, types in counts.items()}


def _enliven(path: Path, layout: Layout) -> None:
    """Give the small tensors values, so that tokens differ and go to different experts."""
    import numpy as np

    from nanorun_converters.output.gguf_header import padded_bytes

    random = np.random.default_rng(0)
    offset = len(layout.header)
    with path.open("r+b") as stream:
        for slot in layout.slots:
            role = role_of(slot.name)
            if slot.type is GgmlType.F32 and role in (Role.ROUTER, Role.NORM):
                n = slot.n_bytes // 4
                values = np.ones(n) if role is Role.NORM else random.normal(0, 0.1, n)
                stream.seek(offset)
                stream.write(values.astype("<f4").tobytes())
            if role is Role.EMBEDDING:
                _fill_embedding(stream, offset, slot.n_bytes, slot.type, slot.shape[-1])
            offset += padded_bytes(slot.n_bytes)


def _fill_embedding(
    stream: BinaryIO, offset: int, n_bytes: int, type_: GgmlType, n_per_row: int
) -> None:
    import numpy as np

    from nanorun_quant.ggml import load_ggml

    numbers = np.random.default_rng(1).normal(0, 1, (256, n_per_row)).astype(np.float32)
    tile = load_ggml().quantize(numbers, type_, np.ones(n_per_row, np.float32)).tobytes()
    stream.seek(offset)
    stream.write((tile * (n_bytes // len(tile) + 1))[:n_bytes])


def _key(shape: ModelShape, hardware: Hardware) -> str:
    types = ",".join(f"{role}={t.label}" for role, t in sorted(_types_of_roles(shape).items()))
    sizes = f"{shape.arch.pattern}/{shape.arch.n_embd}/{shape.arch.n_ff_exp}"
    host = hardware.host
    return f"{host.description}|{host.n_cores}|{version('llama-cpp-python')}|{sizes}|{types}"
