from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nanorun.model.arch import LayerKind
from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.llama.binding import engine_log
from nanorun.runtime.llama.context import Context
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.llama.row import Row

OPTIONS = EngineOptions(n_ctx=256, n_parallel=1, n_seq_spare=0, n_batch=64, n_ubatch=64)


def load(path: Path, n_cpu_moe: int) -> tuple[np.ndarray, set[int]]:
    """Logits after a few tokens, and the blocks whose experts the engine says it moved."""
    options = replace(OPTIONS, n_cpu_moe=n_cpu_moe, n_threads=1)
    model = LoadedModel(path, options)
    lines = [line for _, line in engine_log.lines]
    moved = [m for line in lines if (m := re.match(r"tensor blk\.(\d+)\.(\S+) .*overridden", line))]
    assert all(re.fullmatch(r"ffn_(up|down)_exps\.weight", m[2]) for m in moved)
    context = Context(model, options)
    try:
        (index,) = context.decode([Row(seq_id=0, pos=0, tokens=[5, 6, 7], wants_logits=True)])
        assert index is not None
        return context.logits(index).copy(), {int(m[1]) for m in moved}
    finally:
        context.close()
        model.close()


@pytest.mark.parametrize("n_cpu_moe", [1, 5, 999])
def test_experts_of_the_first_blocks_are_placed_and_answer_the_same(
    pico_f32_gguf: Path, n_cpu_moe: int
) -> None:
    plain, moved = load(pico_f32_gguf, 0)
    assert moved == set()
    placed, moved = load(pico_f32_gguf, n_cpu_moe)
    np.testing.assert_array_equal(placed, plain)
    model = LoadedModel(pico_f32_gguf, OPTIONS)
    with_experts = {i for i, k in enumerate(model.arch.layers) if k is LayerKind.MOE}
    model.close()
    # Blocks are counted, not those with experts.
    assert moved == {i for i in with_experts if i < n_cpu_moe}
    assert n_cpu_moe < 5 or moved
