from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from nanorun.errors import ModelError
from tests.cli.conftest import FakeEngine, Result
from tests.support.fakes import FakeClient

Run = Callable[..., Result]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", ""])
def test_serve_for_others_needs_a_key(nanorun: Run, engine: FakeEngine, host: str) -> None:
    result = nanorun("serve", "pico", "--host", host)
    assert result.code == 2
    assert "there is no API key" in result.err
    assert "NANORUN_API_KEY=" in result.err


@pytest.mark.parametrize("key", ["", "  "])
def test_serve_refuses_an_empty_key(nanorun: Run, engine: FakeEngine, key: str) -> None:
    result = nanorun("serve", "pico", "--host", "0.0.0.0", "--api-key", key)
    assert (result.code, result.err) == (2, "nanorun: error: an API key is empty\n")


def test_serve_on_a_port_that_is_taken_loads_nothing(nanorun: Run, engine: FakeEngine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = nanorun("serve", "pico", "--port", str(port))
    assert result.code == 1
    assert f"cannot listen on 127.0.0.1:{port}: address already in use" in result.err
    assert engine.client.n_starts == 0


def test_serve_that_cannot_load_leaves_with_the_code_of_its_cause(
    nanorun: Run, engine: FakeEngine
) -> None:
    engine.client = FakeClient(start_error=ModelError("pico.gguf is cut short"))
    result = nanorun("serve", "pico", "--port", "0", "--parallel", "2", "--n-ctx", "4k")
    assert result == Result(3, "", "nanorun: error: pico.gguf is cut short\n")
    assert engine.options is not None
    assert (engine.options.n_parallel, engine.options.n_ctx) == (2, 4096)
    assert engine.client.n_closes == 1


def test_serve_refuses_an_idle_time_that_is_none(nanorun: Run, engine: FakeEngine) -> None:
    result = nanorun("serve", "pico", "--keep-alive", "soon")
    assert result.code == 2
    assert "not a duration: 'soon'" in result.err


def test_serve_hands_the_idle_time_on(nanorun: Run, engine: FakeEngine) -> None:
    engine.client = FakeClient(start_error=ModelError("pico.gguf is cut short"))
    nanorun("serve", "pico", "--port", "0", "--keep-alive", "5m")
    assert engine.keep_alive_s == 300
    nanorun("serve", "pico", "--port", "0")
    assert engine.keep_alive_s is None


def test_serve_takes_keys_from_a_file_and_the_environment(
    nanorun: Run, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("laptop: sk-1\n")
    file.chmod(0o600)
    engine.client = FakeClient(start_error=ModelError("pico.gguf is cut short"))
    result = nanorun("serve", "--host", "127.0.0.1", "--port", "0", "--api-key-file", str(file))
    assert (result.code, result.err) == (3, "nanorun: error: pico.gguf is cut short\n")
    monkeypatch.setenv("NANORUN_API_KEYS", "phone: sk-1")
    result = nanorun("serve", "--port", "0", "--api-key-file", str(file))
    assert (result.code, "'phone' is there twice" in result.err) == (2, True)


def test_serve_limits_no_key_where_there_is_none(nanorun: Run, engine: FakeEngine) -> None:
    result = nanorun("serve", "pico", "--max-per-key", "2")
    assert (result.code, "there is no key" in result.err) == (2, True)
