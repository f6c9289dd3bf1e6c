"""The formulas against the engine's own reckoning, which costs no weights to ask for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from nanorun.model.arch import HybridArch
from nanorun.model.engine_options import EngineOptions
from nanorun.model.footprint import kv_bytes, mtp_kv_bytes, output_bytes, state_bytes
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import expected_tensors
from nanorun.plan.graph.compute_graph import compute_bytes, mtp_compute_bytes
from nanorun.runtime.measure.probe import probe_contexts
from nanorun_converters.family.config import arch_from_config
from nanorun_converters.opened.shape_file import write_shape
from nanorun_converters.source.open import open_source
from tests.conftest import PICO_SOURCE
from tests.model.known_archs import (
    LIGHTNING,
    NANO,
    NANO_4B,
    SUPER,
    TINY_DENSE,
    TINY_LATENT_MTP,
    TINY_MOE,
    TINY_PUZZLE,
)

MIB = 2**20
F16, Q8_0, Q4_0 = GgmlType.F16, GgmlType.Q8_0, GgmlType.Q4_0
# The engine prints MiB with two decimals.
PRINTED = 0.006 * MIB


def pico() -> HybridArch:
    source = open_source(PICO_SOURCE)
    return arch_from_config(source.read_json("config.json"), "config.json")


def options(
    n_ctx: int, n_ubatch: int, kv: GgmlType, n_seq: int, n_draft: int, speculation: str = "lookup"
) -> EngineOptions:
    return EngineOptions(
        n_ctx=n_ctx, n_batch=n_ubatch, n_ubatch=n_ubatch, type_k=kv, type_v=kv, n_parallel=n_seq,
        n_seq_spare=0, n_gpu_layers=0, speculation=speculation, n_draft=n_draft,
    )  # fmt: skip


def predicted_context(arch: HybridArch, s: EngineOptions, *, head: bool) -> dict[str, int]:
    """What the formulas say, by the names of the engine's answer."""
    # Rows for drafted tokens are added when they are first asked for.
    output = output_bytes(arch, s.n_seq_max)
    if head:
        return {
            "kv": mtp_kv_bytes(arch, s.n_ctx, s.type_k, s.type_v),
            "state": 0,
            "compute": mtp_compute_bytes(arch, s),
            "output": output,
        }
    return {
        "kv": kv_bytes(arch, s.n_ctx, s.type_k, s.type_v),
        "state": state_bytes(arch, s.n_seq_max, s.n_rs_seq),
        "compute": compute_bytes(arch, s),
        "output": output,
    }


def check(
    folder: Path, arch: HybridArch, contexts: list[EngineOptions], *, head: bool = False
) -> None:
    path = folder / "shape.gguf"
    types = {s.name: Q4_0 if s.quantizable else GgmlType.F32
             for s in expected_tensors(arch).values()}  # fmt: skip
    write_shape(path, arch, types)
    reckoned = [r for part in _dozens(contexts) for r in probe_contexts(path, part, head=head)]
    for context, probed in zip(contexts, reckoned, strict=True):
        predicted = predicted_context(arch, context, head=head)
        for part, n_bytes in predicted.items():
            assert abs(n_bytes - probed[part]) <= PRINTED, (part, context)
        assert sum(predicted.values()) == pytest.approx(sum(probed.values()), rel=0.01)


def _dozens(contexts: list[EngineOptions]) -> Iterator[list[EngineOptions]]:
    for start in range(0, len(contexts), 12):
        yield contexts[start : start + 12]


@pytest.mark.parametrize("arch", [TINY_MOE, TINY_PUZZLE, TINY_DENSE, NANO, LIGHTNING, NANO_4B])
def test_formulas_are_what_the_engine_reckons(arch: HybridArch, tmp_path: Path) -> None:
    contexts = [
        options(8192, 512, F16, 1, 0),
        options(1048576 if arch.n_embd > 64 else 65536, 128, Q4_0, 1, 0),
        options(1000, 500, Q8_0, 3, 1),
        options(512, 2048, F16, 2, 0),
    ]
    # A million cells of KV are reckoned, not allocated.
    check(tmp_path, arch, contexts)


@pytest.mark.parametrize("arch", [TINY_LATENT_MTP, LIGHTNING])
def test_formulas_hold_for_the_context_that_drafts(arch: HybridArch, tmp_path: Path) -> None:
    contexts = [options(4096, 512, F16, 1, 3, "mtp"), options(8192, 64, Q8_0, 4, 1, "mtp")]
    check(tmp_path, arch, contexts)
    check(tmp_path, arch, contexts, head=True)


def grid() -> Iterator[EngineOptions]:
    for n_ctx, n_ubatch, kv in product((256, 8192, 131072, 1048576), (64, 512, 1024), (F16, Q8_0)):
        for n_seq, n_draft in ((1, 0), (2, 1)):
            yield options(n_ctx, n_ubatch, kv, n_seq, n_draft)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pico", "nano", "nano-4b", "lightning", "super"])
def test_formulas_hold_over_a_grid(name: str, tmp_path: Path) -> None:
    shapes = {"nano": NANO, "nano-4b": NANO_4B, "lightning": LIGHTNING, "super": SUPER}
    arch = pico() if name == "pico" else shapes[name]
    contexts = list(grid())
    assert len(contexts) == 48
    check(tmp_path, arch, contexts)
    if arch.n_layer_nextn:
        drafting = [replace(s, speculation="mtp") for s in contexts]
        check(tmp_path, arch, drafting, head=True)
