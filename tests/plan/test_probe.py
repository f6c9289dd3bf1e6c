"""What is said when the engine's process for probing ends badly."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from nanorun.errors import EngineDied
from nanorun.plan.probe import engine_devices


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (-9, "the engine's process was ended by SIGKILL"),
        (-6, "the engine's process was ended by SIGABRT"),
        (70, "the engine's process ended with exit code 70"),
    ],
)
def test_death_of_the_engine_is_told_as_everywhere(
    monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    environments = []

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> Any:
        environments.append(env)
        return subprocess.CompletedProcess(command, code, "", "GGML_ASSERT(a > b)\n\nmore\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(EngineDied) as caught:
        engine_devices()
    assert caught.value.message == message
    assert caught.value.facts[-2:] == ("GGML_ASSERT(a > b)", "more")
    assert any("memory" in fact for fact in caught.value.facts) == (code == -9)
    assert environments[0]["GGML_NO_BACKTRACE"] == "1"
