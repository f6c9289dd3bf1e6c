from __future__ import annotations

from pathlib import Path

import pytest

from nanorun.runtime.process import oom


def test_kills_of_machine_and_group_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmstat, events = tmp_path / "vmstat", tmp_path / "memory.events"
    vmstat.write_text("pgfault 12\noom_kill 3\noom_kill_disable 9\n")
    events.write_text("low 0\noom 4\noom_kill 2\n")
    monkeypatch.setattr(oom, "_COUNTERS", (vmstat, events, tmp_path / "absent"))
    assert oom.count_oom_kills() == 5


@pytest.mark.parametrize(
    ("line", "is_memory"),
    [
        ("CUDA error: out of memory", True),
        ("ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 12", True),
        ("GGML_ASSERT(n_tokens > 0) failed", False),
    ],
)
def test_complaints_about_memory_are_recognised(line: str, is_memory: bool) -> None:
    assert oom.is_about_memory(line) is is_memory
