"""The command line in this process, over a fake client."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nanorun.cli import main
from nanorun.model.engine_options import EngineOptions
from nanorun.model.memory_needs import MemoryNeeds
from tests.support.fakes import FakeClient, fake_shape


@dataclass
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


class FakeEngine:
    """Stands where commands make their client, and keeps what they made it with."""

    def __init__(self) -> None:
        self.client = FakeClient()
        self.path: Path | None = None
        self.options: EngineOptions | None = None
        self.smaller: Sequence[Any] = ()
        self.needs: MemoryNeeds | None = None
        self.keep_alive_s: float | None = None

    def __call__(
        self,
        path: Path,
        options: EngineOptions,
        *,
        smaller: Sequence[Any] = (),
        needs: MemoryNeeds | None = None,
        keep_alive_s: float | None = None,
    ) -> FakeClient:
        self.path, self.options = path, options
        self.client.options = options
        self.smaller, self.keep_alive_s = smaller, keep_alive_s
        self.needs = needs
        return self.client


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """Commands talk to this instead of a child process, and `pico` needs no conversion."""
    fake = FakeEngine()

    def resolve(name_or_path: str, *, progress: Any = None) -> Path:
        return Path(f"/models/{name_or_path}.gguf")

    monkeypatch.setattr("nanorun.runtime.client.EngineClient", fake)
    monkeypatch.setattr("nanorun.library.resolve_model", resolve)
    monkeypatch.setattr("nanorun.cli.models.trained_n_ctx", lambda _path: 1_048_576)
    monkeypatch.setattr("nanorun.cli.planning.shape_of_file", fake_shape)
    return fake


@pytest.fixture
def nanorun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Runs a command line; `stdin` is what comes in by a pipe."""

    def run(*args: str, stdin: str | bytes = "") -> Result:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        with pytest.raises(SystemExit) as caught:
            main(args)
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Result(caught.value.code, captured.out, captured.err)

    return run
