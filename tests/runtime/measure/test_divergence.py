"""KL divergence from a reference: against a slow computation, and where it must be zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nanorun.errors import UsageError
from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.measure.divergence import Divergence, measure, render_plot

TEXT = "What is 47 + 86? The sum is 133. " * 30
OPTIONS = EngineOptions(n_threads=1)
N_CTX = 64


def slow_divergence(reference: Path, model: Path) -> tuple[float, float, float, float]:
    """Mean and 99th percentile of KL, agreement and perplexity, all logits at once."""
    from nanorun.runtime.llama.loaded_model import LoadedModel
    from tests.converters.transformers_reference import engine_logits

    loaded = LoadedModel(reference, OPTIONS)
    tokens = loaded.tokenize(TEXT, special=False)
    loaded.close()
    klds, same, losses = [], [], []
    for start in range(0, len(tokens) - N_CTX + 1, N_CTX):
        chunk = tokens[start : start + N_CTX]
        pair = [engine_logits(path, chunk).astype(np.float64) for path in (reference, model)]
        log_p, log_q = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
                        - x.max(-1, keepdims=True) for x in pair)  # fmt: skip
        half = slice(N_CTX // 2, N_CTX - 1)
        klds.append((np.exp(log_p) * (log_p - log_q)).sum(-1)[half])
        same.append((log_p.argmax(-1) == log_q.argmax(-1))[half])
        targets = np.array(chunk[N_CTX // 2 + 1 :])
        losses.append(-log_q[half][np.arange(len(targets)), targets])
    values = np.concatenate(klds)
    return (
        float(values.mean()), float(np.quantile(values, 0.99)),
        float(np.concatenate(same).mean()), float(np.exp(np.concatenate(losses).mean())),
    )  # fmt: skip


def test_figures_are_those_of_a_slow_computation(pico_f32_gguf: Path, pico_gguf: Path) -> None:
    (found,) = measure(pico_f32_gguf, [pico_gguf], TEXT, N_CTX, OPTIONS)
    mean, p99, top1, ppl = slow_divergence(pico_f32_gguf, pico_gguf)
    # The engine's KV cache is F16 in one and F32 in the other.
    assert found.kld_mean == pytest.approx(mean, rel=0.05)
    assert found.kld_p99 == pytest.approx(p99, rel=0.1)
    assert found.top1_agreement == pytest.approx(top1, abs=0.02)
    assert found.ppl == pytest.approx(ppl, rel=0.01)
    assert found.bytes == pico_gguf.stat().st_size
    assert 8 < found.bpw < 9


def test_model_does_not_stray_from_itself(pico_f32_gguf: Path) -> None:
    (found,) = measure(pico_f32_gguf, [pico_f32_gguf], TEXT, N_CTX, OPTIONS)
    # Not zero: the reference's log probabilities are kept in 16 bits.
    assert abs(found.kld_mean) < 5e-6
    assert found.top1_agreement == 1.0


def test_models_of_other_tokens_cannot_be_compared(pico_f32_gguf: Path, dense_gguf: Path) -> None:
    with pytest.raises(UsageError, match="reads the text as other tokens"):
        measure(pico_f32_gguf, [dense_gguf], TEXT, N_CTX, OPTIONS)


def test_plot_is_an_svg_with_a_point_a_file() -> None:
    import xml.etree.ElementTree as ET

    results = [
        Divergence(f"/m/{name}<.gguf", 9, 2.0, kld, 1.0, 0.9, bpw, 10)
        for name, kld, bpw in (("a", 0.5, 2.4), ("b", 0.02, 4.6), ("c", 0.0, 32.0))
    ]
    root = ET.fromstring("\n".join(render_plot(results)))
    circles = root.findall("{http://www.w3.org/2000/svg}circle")
    heights = [float(circle.attrib["cy"]) for circle in circles]
    assert heights == sorted(heights)
    texts = [text.text for text in root.findall("{http://www.w3.org/2000/svg}text")]
    assert "a<" in texts
