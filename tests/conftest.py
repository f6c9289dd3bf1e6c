"""What every test gets: a home of its own, no network beyond loopback, and pico as a GGUF."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.support.shared_files import made_once

# Set before torch, ggml or tokenizers are imported, which read them once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A thread that waits spins otherwise, on a core that what it waits for may need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # one that fills a core, as its engines do
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_THREAD_LIMIT", "1")

PICO_SOURCE = Path(__file__).parent.parent / "nanorun" / "data" / "pico"

# A shell ignores SIGINT in its background jobs, and every process that is tested would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def walled_off(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the developer's models, chats and settings apart from those of the tests."""
    home = tmp_path_factory.mktemp("home")
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NANORUN_CACHE_DIR", str(home / "cache"))
    for name in ("NANORUN_API_KEY", "OPENAI_API_KEY", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to anything but this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else None
        if host is not None and host not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {host}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def pico_source() -> Path:
    """The source model that ships with nanorun."""
    return PICO_SOURCE


def _convert_pico(factory: pytest.TempPathFactory, recipe: str) -> Path:
    from nanorun_converters.convert import ConvertOptions, convert

    return made_once(
        factory,
        f"pico-{recipe}.gguf",
        lambda path: convert(PICO_SOURCE, ConvertOptions(out=path, recipe=recipe)),
    )


@pytest.fixture(scope="session")
def pico_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pico in Q8_0, converted once a session."""
    return _convert_pico(tmp_path_factory, "q8_0")


@pytest.fixture(scope="session")
def pico_f32_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pico in F32, for comparisons to the last bit."""
    return _convert_pico(tmp_path_factory, "f32")


@pytest.fixture(scope="session")
def dense_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense hybrid (`-` layers), in F32."""
    return _convert_random(tmp_path_factory, "dense.gguf", pattern="M-M*-M-*")


@pytest.fixture(scope="session")
def mtp_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random MoE hybrid with an MTP head, as Lightning's, in F32.

    All its experts are used, so that rounding cannot choose between them.
    """
    return _convert_random(
        tmp_path_factory, "mtp.gguf", pattern="ME*EM*E", mtp=True,
        n_routed_experts=4, num_experts_per_tok=4,
    )  # fmt: skip


def _convert_random(factory: pytest.TempPathFactory, name: str, **shape: Any) -> Path:
    from nanorun_converters.convert import ConvertOptions, convert
    from tests.support.source_models import write_source_model

    def make(path: Path) -> None:
        source = write_source_model(
            factory.mktemp("source") / "source", dtype="F32", vocab_size=1024, **shape
        )
        convert(source, ConvertOptions(out=path, recipe="f32"))

    return made_once(factory, name, make)
