"""The range reader against servers on loopback; more of them in tests/plan and tests/converters."""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nanorun.errors import NanorunError, SourceLostError, SourceUnreachableError, UsageError
from nanorun.net.ranges import Http, Policy, RangeFile
from tests.support.hub_server import TOKEN
from tests.support.waiting import PATIENCE_S

CONTENT = bytes(range(256)) * 4096


class Server:
    """A file at /file; `moved` and `elsewhere` redirect to it; `act` may answer in its place."""

    url = ""
    other = ""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.act: Callable[[BaseHTTPRequestHandler], bool] = lambda request: False


@contextmanager
def serve() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            state.requests.append((self.path, dict(self.headers)))
            if state.act(self):
                return
            if self.path in ("/moved", "/elsewhere"):
                base = state.url if self.path == "/moved" else state.other
                answer(self, 302, b"", Location=f"{base}/file")
                return
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
            assert found is not None
            first, last = int(found[1]), min(int(found[2]), len(CONTENT) - 1)
            span = f"bytes {first}-{last}/{len(CONTENT)}"
            answer(self, 206, CONTENT[first : last + 1], **{"Content-Range": span})

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    state.url, state.other = (f"http://127.0.0.1:{s.server_address[1]}" for s in servers)
    try:
        yield state
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def answer(request: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve() as state:
        monkeypatch.setenv("HF_ENDPOINT", state.url)
        yield state


def file_at(url: str, policy: Policy | None = None, n_bytes: int | None = None) -> RangeFile:
    http = Http(policy or Policy(), pause=lambda seconds: None)
    return RangeFile(http, url, "the file", n_bytes)


def test_many_threads_read_one_file_at_once(server: Server) -> None:
    file = file_at(f"{server.url}/elsewhere", n_bytes=len(CONTENT))
    with ThreadPoolExecutor(12) as pool:
        starts = range(0, len(CONTENT), 65536)
        parts = list(pool.map(lambda start: file.read(start, 65536), starts))
    assert b"".join(parts) == CONTENT


def test_range_beyond_the_end_is_what_is_left(server: Server) -> None:
    file = file_at(f"{server.url}/file")
    assert file.read(len(CONTENT) - 10, 100) == CONTENT[-10:]
    assert file.n_bytes == len(CONTENT)
    assert file.read(len(CONTENT), 100) == b""


def test_what_arrived_is_not_asked_for_again(server: Server) -> None:
    def cut(request: BaseHTTPRequestHandler) -> bool:
        if len(server.requests) > 1:
            return False
        request.send_response(206)
        request.send_header("Content-Range", f"bytes 0-99999/{len(CONTENT)}")
        request.send_header("Content-Length", "100000")
        request.end_headers()
        request.wfile.write(CONTENT[:70_000])
        request.close_connection = True
        return True

    server.act = cut
    assert file_at(f"{server.url}/file").read(0, 100_000) == CONTENT[:100_000]
    assert [headers["Range"] for _, headers in server.requests] == [
        "bytes=0-99999",
        "bytes=70000-99999",
    ]


def test_redirect_is_remembered_and_its_target_is_not_shown_the_token(server: Server) -> None:
    file = file_at(f"{server.url}/elsewhere")
    for offset in (0, 5):
        assert file.read(offset, 5) == CONTENT[offset : offset + 5]
    assert [path for path, _ in server.requests] == ["/elsewhere", "/file", "/file"]
    shown = [TOKEN in str(headers) for _, headers in server.requests]
    assert shown == [True, False, False]


def test_redirect_within_the_hub_is_shown_the_token(server: Server) -> None:
    file_at(f"{server.url}/moved").read(0, 5)
    assert [TOKEN in str(headers) for _, headers in server.requests] == [True, True]


def test_address_that_runs_out_is_asked_for_again(server: Server) -> None:
    file = file_at(f"{server.url}/elsewhere")
    file.read(0, 5)

    def run_out(request: BaseHTTPRequestHandler) -> bool:
        if len(server.requests) == 3:
            answer(request, 403, b"expired")
            return True
        return False

    server.act = run_out
    assert file.read(5, 5) == CONTENT[5:10]
    assert [path for path, _ in server.requests[2:]] == ["/file", "/elsewhere", "/file"]


def test_refusal_of_the_hub_tells_of_the_licence(server: Server) -> None:
    server.act = lambda request: answer(request, 403, b"") is None
    with pytest.raises(SourceLostError, match="the Hub does not let you read it") as caught:
        file_at(f"{server.url}/file").read(0, 5)
    assert "licence" in caught.value.facts[0]
    with pytest.raises(SourceLostError, match="the server does not let you read it"):
        file_at(f"{server.other}/file").read(0, 5)


def test_refused_connection_is_told_within_three_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}/file"
    pauses: list[float] = []
    with pytest.raises(SourceUnreachableError, match="cannot be read") as caught:
        RangeFile(Http(Policy(), pauses.append), url, "the file").read(0, 5)
    assert "ConnectError" in caught.value.facts[0]
    assert sum(pauses) < 1


def test_server_that_answered_before_is_waited_for_and_that_is_told(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.act = lambda request: answer(request, 503, b"", **{"Retry-After": "7"}) is None
    pauses: list[float] = []
    with (
        caplog.at_level(logging.WARNING, "nanorun.net"),
        pytest.raises(SourceUnreachableError) as caught,
    ):
        RangeFile(Http(Policy(), pauses.append), f"{server.url}/file", "the file").read(0, 5)
    assert caught.value.facts == ("HTTP status 503",)
    assert len(pauses) == Policy().n_tries - 1
    assert min(pauses) >= 7
    assert caplog.messages == ["the file: HTTP status 503; trying again in 7 s"]


def test_endless_wish_to_wait_is_bounded(server: Server) -> None:
    server.act = lambda request: answer(request, 429, b"", **{"Retry-After": "99999"}) is None
    pauses: list[float] = []
    with pytest.raises(SourceUnreachableError):
        RangeFile(Http(Policy(), pauses.append), f"{server.url}/file", "the file").read(0, 5)
    assert max(pauses) == Policy().longest_asked_pause_s


def test_reading_can_be_given_up_from_another_thread(server: Server) -> None:
    server.act = lambda request: answer(request, 503, b"", **{"Retry-After": "100"}) is None
    http = Http()
    file = RangeFile(http, f"{server.url}/file", "the file")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(file.read, 0, 5)
        while not server.requests:
            time.sleep(0.01)
        http.give_up()
        with pytest.raises(SourceUnreachableError) as caught:
            reading.result(PATIENCE_S)
    assert caught.value.facts == ("it was given up",)


def test_deadline_ends_an_answer_that_trickles(server: Server) -> None:
    def trickle(request: BaseHTTPRequestHandler) -> bool:
        request.send_response(206)
        request.send_header("Content-Range", f"bytes 0-999/{len(CONTENT)}")
        request.send_header("Content-Length", "1000")
        request.end_headers()
        for i in range(1000):
            try:
                request.wfile.write(CONTENT[i : i + 1])
            except OSError:
                break
            time.sleep(0.02)
        request.close_connection = True
        return True

    server.act = trickle
    with pytest.raises(SourceUnreachableError, match="cannot be read") as caught:
        file_at(f"{server.url}/file", Policy(deadline_s=0.3)).read(0, 1000)
    assert "it did not arrive in" in caught.value.facts[0]


def test_server_without_ranges_is_not_read_to_a_far_offset(server: Server) -> None:
    server.act = lambda request: answer(request, 200, CONTENT) is None
    file = file_at(f"{server.url}/file", n_bytes=len(CONTENT))
    assert file.read(70_000, 9) == CONTENT[70_000:70_009]
    with pytest.raises(NanorunError, match="cannot be read") as caught:
        file_at(f"{server.url}/file", n_bytes=2**40).read(2**39, 9)
    assert caught.value.facts == ("the server knows no ranges",)


def test_proxy_of_the_environment_is_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.other)
    monkeypatch.setenv("no_proxy", "")
    assert file_at("http://far.test/file").read(0, 5) == CONTENT[:5]
    assert server.requests[0][0] == "http://far.test/file"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(SourceUnreachableError) as caught:
        file_at("http://far.test/file").read(0, 5)
    assert "refused by the proxy http://127.0.0.1:9" in caught.value.facts[0]
    monkeypatch.setenv("http_proxy", "http://[::1")
    with pytest.raises(UsageError, match="http_proxy"):
        file_at("http://far.test/file").read(0, 5)
