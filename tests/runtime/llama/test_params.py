"""Options as llama.cpp's parameters: what sizes a model's memory changes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nanorun.model.engine_options import EngineOptions
from nanorun.model.ggml_type import GgmlType
from nanorun.runtime.llama.binding import load_llama
from nanorun.runtime.llama.params import context_params, model_params

OPTIONS = EngineOptions(n_ctx=4096, n_parallel=2, n_seq_spare=3, n_threads=5)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"n_ctx": 8192}, {"n_ctx"}),
        ({"n_parallel": 3}, {"n_seq_max", "n_outputs_max"}),
        ({"n_seq_spare": 0}, {"n_seq_max", "n_outputs_max"}),
        ({"n_batch": 256}, {"n_batch", "n_ubatch"}),
        ({"n_ubatch": 256}, {"n_ubatch"}),
        ({"n_threads": 1}, {"n_threads", "n_threads_batch"}),
        ({"type_k": GgmlType.Q8_0}, {"type_k"}),
        ({"type_v": GgmlType.Q4_0}, {"type_v"}),
        ({"speculation": "lookup"}, {"n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq"}),
        ({"checkpoint_bytes": 0, "archive_bytes": 0, "n_gpu_layers": 0}, set()),
    ],
)
def test_each_size_has_its_parameters(changes: dict[str, Any], names: set[str]) -> None:
    llama = load_llama()
    before = context_params(llama, OPTIONS)
    after = context_params(llama, replace(OPTIONS, **changes))
    assert _different(before, after) == names


def test_rows_of_logits_are_those_that_the_plan_counts() -> None:
    llama, options = load_llama(), replace(OPTIONS, speculation="mtp", n_draft=3)
    assert context_params(llama, options).n_outputs_max == options.n_outputs_max == 5 * 4
    assert context_params(llama, options, head=True).n_outputs_max == options.n_seq_max
    assert context_params(llama, options, n_outputs_max=7).n_outputs_max == 7


def test_context_of_the_head_differs_in_what_it_is_for() -> None:
    llama, options = load_llama(), replace(OPTIONS, speculation="mtp")
    different = _different(
        context_params(llama, options), context_params(llama, options, head=True)
    )
    assert different == {"ctx_type", "n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq"}


def test_head_is_loaded_where_it_drafts() -> None:
    llama = load_llama()
    assert not model_params(llama, OPTIONS).load_mtp
    assert model_params(llama, replace(OPTIONS, speculation="mtp")).load_mtp


def _different(before: Any, after: Any) -> set[str]:
    names = [name for name, *_ in type(before)._fields_ if isinstance(getattr(before, name), int)]
    return {name for name in names if getattr(before, name) != getattr(after, name)}
