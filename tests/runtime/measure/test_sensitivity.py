"""How much noise in each tensor matters: against a changed file, and where it cannot be known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nanorun.errors import UsageError
from nanorun.model.engine_options import EngineOptions
from nanorun.model.gguf import read_gguf
from nanorun.runtime.measure.divergence import measure
from nanorun.runtime.measure.imatrix import collect_imatrix
from nanorun.runtime.measure.perplexity import Source
from nanorun.runtime.measure.sensitivity import _rounded, measure_sensitivity
from nanorun_quant.imatrix_file import read_imatrix

TEXT = "What is 47 + 86? 7+6+0=13, 4+8+1=13 133. " * 30
SOURCE = Source(TEXT, 64)
OPTIONS = EngineOptions(n_threads=1)


@pytest.fixture(scope="module")
def measured(pico_f32_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sensitivity") / "i.gguf"
    collect_imatrix(pico_f32_gguf, TEXT, "t", out, 64, OPTIONS)
    measure_sensitivity(pico_f32_gguf, SOURCE, out, 100, OPTIONS)
    return out


def test_every_tensor_whose_type_is_chosen_is_measured(pico_f32_gguf: Path, measured: Path) -> None:
    found = read_imatrix(measured).sensitivity
    tensors = read_gguf(pico_f32_gguf).tensors
    assert {"token_embd.weight", "output.weight", "blk.1.ffn_up_exps.weight"} <= found.keys()
    assert all(len(tensors[name].shape) > 1 for name in found)
    assert len(found) > 20
    assert all(number >= 0 for number in found.values())
    assert found["token_embd.weight"] > found["blk.6.attn_q.weight"]


@pytest.mark.parametrize("name", ["blk.0.ssm_out.weight", "blk.4.ffn_down_exps.weight"])
def test_figure_is_that_of_a_file_with_the_tensor_rounded(
    name: str, pico_f32_gguf: Path, measured: Path, tmp_path: Path
) -> None:
    imatrix = read_imatrix(measured)
    tensor = read_gguf(pico_f32_gguf).tensors[name]
    raw = bytearray(pico_f32_gguf.read_bytes())
    rows = np.frombuffer(raw, "<f4", tensor.n_elements, tensor.offset)
    rows = rows.reshape(tensor.shape).copy()
    changed = _rounded(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)
    raw[tensor.offset : tensor.offset + tensor.n_bytes] = changed.tobytes()
    path = tmp_path / "rounded.gguf"
    path.write_bytes(raw)
    (found,) = measure(pico_f32_gguf, [path], TEXT, 64, OPTIONS)
    stack = rows if rows.ndim == 3 else rows[None]
    new = changed if rows.ndim == 3 else changed[None]
    noise = signal = 0.0
    for i, share in enumerate(imatrix.shares(name, len(stack))):
        weights = imatrix.weights(name, i, rows.shape[-1])
        noise += share * float((np.square(new[i] - stack[i]) @ weights).sum())
        signal += share * float((np.square(stack[i]) @ weights).sum())
    assert imatrix.sensitivity[name] == pytest.approx(found.kld_mean / (noise / signal), rel=0.01)


def test_stopped_run_is_continued_and_gives_the_same(
    pico_f32_gguf: Path, measured: Path, tmp_path: Path
) -> None:
    expected = read_imatrix(measured).sensitivity
    out = tmp_path / "i.gguf"
    collect_imatrix(pico_f32_gguf, TEXT, "t", out, 64, OPTIONS)

    def stop(_name: str, n_done: int, _n_total: int) -> None:
        if n_done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(pico_f32_gguf, SOURCE, out, 100, OPTIONS, stop)
    assert 3 <= len(read_imatrix(out).sensitivity) < len(expected)
    found = measure_sensitivity(pico_f32_gguf, SOURCE, out, 100, OPTIONS).sensitivity
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_text_must_be_that_of_the_imatrix_and_the_model_writable(
    pico_f32_gguf: Path, pico_source: Path, measured: Path, tmp_path: Path
) -> None:
    from nanorun_converters.convert import ConvertOptions, convert

    with pytest.raises(UsageError, match="is of another text"):
        measure_sensitivity(pico_f32_gguf, Source("other " * 99, 64), measured, 1, OPTIONS)
    coarse = tmp_path / "q4_0.gguf"
    convert(pico_source, ConvertOptions(out=coarse, recipe="q4_0"))
    with pytest.raises(UsageError, match="is q4_0: sensitivity is measured on a file of f32 f16"):
        measure_sensitivity(coarse, SOURCE, measured, 1, OPTIONS)


def test_q8_0_file_will_do(pico_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "i.gguf"
    collect_imatrix(pico_gguf, TEXT, "t", out, 64, OPTIONS)
    found = measure_sensitivity(pico_gguf, SOURCE, out, 4, OPTIONS).sensitivity
    assert found["token_embd.weight"] > 0
