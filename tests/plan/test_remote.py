"""GGUF headers elsewhere, from servers of every kind; nothing but loopback is asked."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nanorun.errors import ModelError, NanorunError
from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import GgufFile, read_gguf
from nanorun.model.tensor_roles import expected_tensors
from nanorun.plan import remote as remote_module
from nanorun.plan.remote import RemoteFile, parse_remote, read_remote_gguf
from nanorun_converters.opened.shape_file import write_shape
from tests.model.known_archs import TINY_MOE
from tests.support.hub_server import REPOSITORY, TOKEN, FakeHub, serve_hub
from tests.support.waiting import little_work

MIB = 2**20


@dataclass
class Behaviour:
    """What the server does; every field but the first is a fault."""

    content: bytes
    knows_ranges: bool = True
    content_range: str | None = None
    """Instead of the true one."""
    status: int = 0
    n_failures: int = 0
    """Requests that are answered with 503 first."""
    n_cut: int = 0
    """Requests whose answers end half way first."""
    more: bytes = b""
    """Sent behind what was asked for."""
    location: str = ""
    tells_size: bool = True
    grows: bool = False
    stalls_s: float = 0.0
    n_requests: int = 0
    n_bytes_sent: int = 0
    headers_seen: list[dict[str, str]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    behaviour: Behaviour

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        does = self.behaviour
        does.n_requests += 1
        does.headers_seen.append(dict(self.headers))
        time.sleep(does.stalls_s)
        if does.location:
            self.reply(302, b"", {"Location": does.location})
        elif does.n_failures:
            does.n_failures -= 1
            self.reply(503, b"busy", {})
        elif does.status:
            self.reply(does.status, b"no", {})
        elif not does.knows_ranges:
            self.reply(200, does.content, {})
        else:
            self.ranged()

    def ranged(self) -> None:
        does = self.behaviour
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert found is not None
        first, last = int(found[1]), min(int(found[2]), len(does.content) - 1)
        if first >= len(does.content):
            self.reply(416, b"", {})
            return
        total = len(does.content) + (does.n_requests if does.grows else 0)
        span = does.content_range or f"bytes {first}-{last}/{total}"
        self.reply(206, does.content[first : last + 1] + does.more, {"Content-Range": span})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        does = self.behaviour
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if does.tells_size:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if does.n_cut and status == 206:
            does.n_cut -= 1
            body = body[: len(body) // 2]
            self.close_connection = True
        if not does.tells_size:
            self.close_connection = True
        for start in range(0, len(body), MIB):
            try:
                self.wfile.write(body[start : start + MIB])
            except OSError:
                self.close_connection = True
                return
            does.n_bytes_sent += len(body[start : start + MIB])


@contextmanager
def serve(behaviour: Behaviour) -> Iterator[str]:
    handler = type("Bound", (Handler,), {"behaviour": behaviour})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(remote_module, "POLICY", replace(remote_module.POLICY, first_pause_s=0.0))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    types = {s.name: GgmlType.F32 for s in expected_tensors(TINY_MOE).values()}
    write_shape(path, TINY_MOE, types)
    return path


def read(url: str) -> GgufFile:
    remote = parse_remote(url)
    assert remote is not None
    return read_remote_gguf(remote)


def same(found: GgufFile, expected: GgufFile) -> bool:
    def entries(gguf: GgufFile) -> list[tuple[object, ...]]:
        return [(t.name, t.type, t.shape, t.offset, t.n_bytes) for t in gguf.tensors.values()]

    return found.metadata == expected.metadata and entries(found) == entries(expected)


def test_header_is_that_of_the_file(tiny: Path) -> None:
    with serve(Behaviour(tiny.read_bytes())) as url:
        found = read(f"{url}/models/tiny.gguf?download=true")
    assert same(found, read_gguf(tiny))
    assert found.file_bytes == tiny.stat().st_size
    assert str(found.path).endswith("/models/tiny.gguf")


def test_no_more_than_the_header_is_fetched(tmp_path: Path) -> None:
    """A long header, of a vocabulary's size, before data that is never asked for."""
    path = tmp_path / "nano.gguf"
    types = {s.name: GgmlType.F32 for s in expected_tensors(TINY_MOE).values()}
    write_shape(path, TINY_MOE, types)
    header = read_gguf(path).data_offset
    behaviour = Behaviour(path.read_bytes() + bytes(64 * MIB))
    with serve(behaviour) as url:
        read(f"{url}/nano.gguf")
    assert behaviour.n_bytes_sent <= MIB + header


def test_long_header_is_fetched_in_growing_ranges(tmp_path: Path, pico_gguf: Path) -> None:
    from tests.support.builders import arch_tensors, gguf_metadata, write_gguf

    metadata = gguf_metadata(TINY_MOE)
    metadata["tokenizer.ggml.merges"] = [f"{i} {'x' * 40}" for i in range(200_000)]
    path = write_gguf(tmp_path / "long.gguf", metadata, arch_tensors(TINY_MOE, GgmlType.Q8_0))
    behaviour = Behaviour(path.read_bytes())
    with serve(behaviour) as url, little_work(cpu_s=10):  # the server's thread counts too
        found = read(f"{url}/long.gguf")
    assert found.data_offset > 9 * MIB
    assert same(found, read_gguf(path))
    asked = [seen["Range"] for seen in behaviour.headers_seen]
    assert asked[:3] == ["bytes=0-1048575", "bytes=1048576-3145727", "bytes=3145728-7340031"]
    assert len(asked) == 4


def test_server_without_ranges_is_hung_up_on(tiny: Path) -> None:
    behaviour = Behaviour(tiny.read_bytes() + bytes(64 * MIB), knows_ranges=False)
    with serve(behaviour) as url:
        found = read(f"{url}/tiny.gguf")
    assert same(found, read_gguf(tiny))
    assert behaviour.n_requests == 1
    assert behaviour.n_bytes_sent < 32 * MIB


@pytest.mark.parametrize("fault", [{"n_failures": 2}, {"n_cut": 2}, {"more": b"x" * 1000}])
def test_fault_that_passes_is_met_by_asking_again(tiny: Path, fault: dict[str, object]) -> None:
    with serve(Behaviour(tiny.read_bytes(), **fault)) as url:  # type: ignore[arg-type]
        assert same(read(f"{url}/tiny.gguf"), read_gguf(tiny))


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"n_failures": 9}, "cannot be read"),
        ({"n_cut": 99}, "cannot be read"),
        ({"status": 404}, "there is no such file"),
        ({"status": 403}, "does not let you read it"),
        ({"status": 418}, "cannot be read"),
        ({"content": b""}, "found nothing from byte 0 on"),
        ({"content": b"GGUF"}, "expected 4 bytes at byte 4, found a file of 4 bytes"),
        ({"content": b"<html>" * 9}, "expected a GGUF file, found a web page"),
        ({"content_range": "bytes 5-9/10"}, "expected bytes 0 to 1048575, found 'bytes 5-9/10'"),
        ({"content_range": "bytes 0-99/50"}, "found 'bytes 0-99/50'"),
        ({"content_range": "bytes 0-99/*"}, r"found 'bytes 0-99/\*'"),
        ({"content_range": "lines 1-2"}, "found 'lines 1-2'"),
        ({"content_range": f"bytes 0-99/{10**30}"}, "expected bytes 0 to 1048575"),
        ({"content_range": "bytes 0-4000000/5000000"}, "expected bytes 0 to 1048575"),
        ({"knows_ranges": False, "tells_size": False}, "cannot be read"),
    ],
)
def test_server_that_cannot_be_used_is_an_error(
    tiny: Path, fault: dict[str, object], error: str
) -> None:
    behaviour = Behaviour(**({"content": tiny.read_bytes()} | fault))  # type: ignore[arg-type]
    with serve(behaviour) as url, pytest.raises(NanorunError, match=error) as caught:
        read(f"{url}/models/x.gguf?signature=secret")
    assert "secret" not in caught.value.render()


def test_tensors_that_do_not_fit_the_stated_size_are_refused(tiny: Path) -> None:
    cut = tiny.read_bytes()[: read_gguf(tiny).data_offset + 100]
    with serve(Behaviour(cut)) as url, pytest.raises(ModelError, match="it is truncated"):
        read(f"{url}/x.gguf")


def test_endless_header_is_cut_off() -> None:
    # One key whose text claims 15 MiB, five times over.
    text = (15 * MIB).to_bytes(8, "little") + bytes(15 * MIB)
    keys = b"".join(
        (2).to_bytes(8, "little") + f"k{i}".encode() + (8).to_bytes(4, "little") + text
        for i in range(5)
    )
    start = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little")
    behaviour = Behaviour(start + (5).to_bytes(8, "little") + keys)
    with serve(behaviour) as url, pytest.raises(ModelError, match="header of at most 67108864"):
        read(f"{url}/x.gguf")


def test_file_that_changes_in_between_is_an_error(tmp_path: Path) -> None:
    from tests.support.builders import arch_tensors, gguf_metadata, write_gguf

    metadata = gguf_metadata(TINY_MOE)
    metadata["tokenizer.ggml.merges"] = ["x" * 60] * 50_000
    path = write_gguf(tmp_path / "long.gguf", metadata, arch_tensors(TINY_MOE, GgmlType.Q8_0))
    behaviour = Behaviour(path.read_bytes(), grows=True)
    with serve(behaviour) as url, pytest.raises(ModelError, match="changed while it was read"):
        read(f"{url}/x.gguf")


def test_redirects_are_followed_and_end(tiny: Path) -> None:
    behaviour = Behaviour(tiny.read_bytes())
    with serve(behaviour) as there, serve(Behaviour(b"", location=f"{there}/t.gguf")) as url:
        assert same(read(f"{url}/x.gguf"), read_gguf(tiny))
    looping = Behaviour(b"", location="/again")
    with serve(looping) as url, pytest.raises(NanorunError, match="cannot be read"):
        read(f"{url}/x.gguf")
    strange = Behaviour(b"", location="file:///etc/passwd")
    with serve(strange) as url, pytest.raises(NanorunError, match="cannot be read"):
        read(f"{url}/x.gguf")


def test_server_that_keeps_waiting_is_left(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = replace(remote_module.POLICY, timeout_s=0.1, first_pause_s=0.0)
    monkeypatch.setattr(remote_module, "POLICY", policy)
    behaviour = Behaviour(tiny.read_bytes(), stalls_s=0.5)
    with serve(behaviour) as url, pytest.raises(NanorunError, match="cannot be read") as caught:
        read(f"{url}/x.gguf")
    assert "Timeout" in caught.value.facts[0]


def test_nobody_listening_is_an_error() -> None:
    with pytest.raises(NanorunError, match=r"127\.0\.0\.1:9/x\.gguf cannot be read"):
        read("http://127.0.0.1:9/x.gguf")


# -- the Hub ------------------------------------------------------------------------------------


@pytest.fixture
def hub(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_hub(tiny.parent) as served:
        served.lfs = (".gguf",)
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        yield served


@pytest.mark.parametrize("form", ["{r}/tiny.gguf", "hf://{r}/tiny.gguf", "hf://{r}@main/tiny.gguf"])
def test_file_on_the_hub_is_read_from_its_storage(hub: FakeHub, tiny: Path, form: str) -> None:
    assert same(read(form.format(r=REPOSITORY)), read_gguf(tiny))
    assert hub.requests["GET storage"] == 1


def test_address_of_the_hubs_page_will_do(hub: FakeHub, tiny: Path) -> None:
    assert same(read(f"{hub.endpoint}/{REPOSITORY}/blob/main/tiny.gguf"), read_gguf(tiny))


def test_token_goes_to_the_hub_only(
    hub: FakeHub, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = TOKEN
    with pytest.raises(ModelError, match="does not let you read it") as caught:
        read(f"{REPOSITORY}/tiny.gguf")
    assert caught.value.tries == ("hf auth login",)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert same(read(f"{REPOSITORY}/tiny.gguf"), read_gguf(tiny))
    assert hub.leaked == []
    elsewhere = Behaviour(tiny.read_bytes())
    with serve(elsewhere) as url:
        read(f"{url}/tiny.gguf")
    assert "Authorization" not in elsewhere.headers_seen[0]


@pytest.mark.parametrize("model", ["nano", "nano:q4", "x.gguf", "a/x.gguf", "./a/b/x.gguf",
                                   "/a/b/x.gguf", "nvidia/Tiny", "ftp://a/b.gguf"])  # fmt: skip
def test_other_models_are_not_elsewhere(model: str) -> None:
    assert parse_remote(model) is None


def test_offline_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NanorunError, match="cannot be read") as caught:
        read("http://127.0.0.1:9/x.gguf")
    assert "HF_HUB_OFFLINE" in caught.value.facts[0]


def test_parts_of_a_split_file_are_found_beside_it() -> None:
    remote = RemoteFile("http://h/a%20b/x-00001-of-00002.gguf?s=1", "h/a b/x-00001-of-00002.gguf")
    other = remote.sibling("x-00002-of-00002.gguf")
    assert other.url == "http://h/a%20b/x-00002-of-00002.gguf?s=1"
    assert other.shown == "h/a b/x-00002-of-00002.gguf"
