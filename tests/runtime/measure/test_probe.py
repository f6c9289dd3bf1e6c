"""Asking the engine about memory, in a child process."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanorun.errors import EngineDied, EngineError
from nanorun.model.engine_options import EngineOptions
from nanorun.model.measurement import PROBED
from nanorun.runtime.measure import probe
from nanorun.runtime.measure.probe import engine_devices, measure, probe_contexts, probe_plan

OPTIONS = EngineOptions(n_ctx=512, n_parallel=2, n_seq_spare=0, n_threads=1, n_gpu_layers=0)


def test_engine_names_its_devices() -> None:
    processor = next(device for device in engine_devices() if device["type"] == "cpu")
    assert processor["name"] == "CPU"
    assert 0 < processor["free_bytes"] <= processor["total_bytes"]


def test_contexts_are_reckoned_in_the_order_asked(pico_gguf: Path) -> None:
    large = EngineOptions(n_ctx=2048, n_parallel=2, n_seq_spare=0, n_threads=1, n_gpu_layers=0)
    small, larger = probe_contexts(pico_gguf, [OPTIONS, large])
    assert set(small) == set(PROBED)
    assert larger["kv"] == 4 * small["kv"] > 0
    assert larger["state"] == small["state"] > 0


def test_head_that_drafts_is_counted_with_its_model(mtp_gguf: Path) -> None:
    options = EngineOptions(
        n_ctx=512, n_threads=1, n_gpu_layers=0, speculation="mtp", n_parallel=1, n_seq_spare=0
    )
    (main,) = probe_contexts(mtp_gguf, [options])
    (head,) = probe_contexts(mtp_gguf, [options], head=True)
    assert head["kv"] > 0 and head["state"] == 0
    assert probe_plan(mtp_gguf, options) == {part: main[part] + head[part] for part in PROBED}


def test_measuring_runs_the_model(pico_gguf: Path) -> None:
    measured = measure(pico_gguf, OPTIONS, 64)
    (probed,) = probe_contexts(pico_gguf, [OPTIONS])
    assert sum(measured.kv.values()) == probed["kv"]
    assert sum(measured.weights.values()) > 0
    assert measured.base_bytes < measured.resident_bytes <= measured.peak_bytes
    assert min(measured.load_s, measured.prefill_tps, measured.decode_tps) > 0


def test_file_that_the_engine_refuses_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(EngineError, match=r"bad\.gguf could not be opened by llama\.cpp"):
        probe_contexts(bad, [OPTIONS])


def test_engine_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_TIMEOUT_S", 0.01)
    with pytest.raises(EngineDied, match=r"the engine gave no answer in 0\.01 s"):
        engine_devices()
