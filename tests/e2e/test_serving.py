"""What shows on real sockets and in a real process: leaving, limits, draining."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Live, ServeProcess, serving
from tests.support.fakes import reply
from tests.support.waiting import PATIENCE_S, wait_until

Start = Callable[..., Live]


def body_of(*, stream: bool) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "x"}], "stream": stream}


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_hangs_up_cancels_its_reply(live: Start, stream: bool) -> None:
    endpoint = live([*reply("one two")[:2], asyncio.Event()])
    body = json.dumps(body_of(stream=stream)).encode()
    address = httpx.URL(endpoint.url)
    with socket.create_connection((address.host, address.port or 0)) as connection:
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        wait_until(lambda: bool(endpoint.client.requests))
        wait_until(lambda: len(endpoint.client.last.generation.sent) == 2)
    wait_until(lambda: endpoint.client.last.generation.was_abandoned)
    health = httpx.get(endpoint.url.removesuffix("/v1") + "/health").json()
    assert health["n_active"] == 0


def test_body_without_end_is_refused_while_it_arrives(live: Start) -> None:
    endpoint = live(reply("x"), max_body_bytes=10_000)

    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 1000

    # The server may hang up before the answer is read; either way it took no more than the limit.
    try:
        response = httpx.post(
            f"{endpoint.url}/chat/completions",
            content=endless(),
            headers={"content-type": "application/json"},
            timeout=PATIENCE_S,
        )
    except (httpx.WriteError, httpx.ReadError):
        pass
    else:
        assert response.status_code == 413
    assert endpoint.client.requests == []


@pytest.mark.skipif(sys.platform != "linux", reason="F_SETPIPE_SZ is Linux's")
def test_log_that_nobody_reads_holds_nothing_up() -> None:
    from fcntl import F_SETPIPE_SZ, fcntl

    with serving("short") as server:
        assert server.process.stderr is not None
        fcntl(server.process.stderr, F_SETPIPE_SZ, 4096)
        with httpx.Client(timeout=PATIENCE_S) as client:
            for _ in range(60):  # some 10,000 bytes of lines
                answer = client.post(f"{server.url}/chat/completions", json=body_of(stream=False))
                assert answer.status_code == 200


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], " POST /v1/chat/completions 200 model=pico "),
        (["--no-log-requests"], None),
        (["--no-log-requests", "--log-contents"], 'answered "{'),
    ],
)
def test_serve_logs_what_it_is_told_to(flags: list[str], expected: str | None) -> None:
    with serving("short", *flags) as server:
        httpx.post(f"{server.url}/chat/completions", json=body_of(stream=False))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.stderr is not None
        log = server.process.stderr.read()
        assert server.process.wait(PATIENCE_S) == 0
    if expected is None:
        assert log == ""
    else:
        assert expected in log


def test_serve_greets_with_what_a_client_needs() -> None:
    with serving("short") as server:
        assert server.greeting == (
            f"nanorun: serving pico on {server.url} (n_ctx 8192, 4 in parallel, CPU)\n"
        )
        response = httpx.post(f"{server.url}/chat/completions", json=body_of(stream=False))
    assert response.json()["choices"][0]["message"]["content"] == "it is 4"


class Reader(threading.Thread):
    """Reads a stream to its end beside the test."""

    def __init__(self, server: ServeProcess) -> None:
        super().__init__()
        self.url = f"{server.url}/chat/completions"
        self.text = ""
        self.failed = False

    def run(self) -> None:
        try:
            with httpx.stream(
                "POST", self.url, json=body_of(stream=True), timeout=PATIENCE_S
            ) as response:
                for piece in response.iter_text():
                    self.text += piece
        except httpx.HTTPError:
            self.failed = True


def start_reading(server: ServeProcess) -> Reader:
    reader = Reader(server)
    reader.start()
    wait_until(lambda: "word" in reader.text)
    return reader


def refuses_connections(server: ServeProcess) -> bool:
    try:
        httpx.get(f"{server.url}/models", timeout=PATIENCE_S)
    except httpx.ConnectError:
        return True
    except httpx.TransportError:  # it was taken, and then let go
        return False
    return False


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a fake notes how far it is."""
    monkeypatch.setenv("FAKE_NANORUN_NOTES", str(tmp_path))
    return tmp_path


def test_sigterm_lets_the_answer_finish_and_takes_no_other(notes: Path) -> None:
    with serving("gated") as server:
        reader = start_reading(server)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses_connections(server))
        assert reader.is_alive()
        (notes / "go-on").touch()
        reader.join(PATIENCE_S)
        assert server.process.wait(PATIENCE_S) == 0
    assert reader.text.count('"content":"word "') == 50
    assert reader.text.endswith("data: [DONE]\n\n")


def test_sigterm_without_requests_ends_at_once() -> None:
    with serving("short") as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) == 0
        assert server.process.stderr is not None
        assert server.process.stderr.read() == ""


def test_sigterm_while_loading_ends_it(notes: Path) -> None:
    import subprocess
    import sys

    from tests.e2e.conftest import FAKE

    command = [sys.executable, str(FAKE), "loading", "serve", "pico", "--port", "0"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        wait_until((notes / "started").exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == -signal.SIGTERM


def test_ctrl_c_twice_cuts_the_answer_off() -> None:
    with serving("long") as server:
        reader = start_reading(server)
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: refuses_connections(server))
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE_S) == 130
        reader.join(PATIENCE_S)
        assert server.process.stderr is not None
        (line,) = server.process.stderr.read().splitlines()
    assert " POST /v1/chat/completions 200 " in line and " finish=abort " in line
    assert "[DONE]" not in reader.text


def test_drain_has_an_end(live: Start) -> None:
    endpoint = live([*reply("one two")[:2], asyncio.Event()])

    def ask() -> None:
        with suppress(httpx.HTTPError):
            httpx.post(
                f"{endpoint.url}/chat/completions", json=body_of(stream=False), timeout=PATIENCE_S
            )

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: bool(endpoint.client.requests))
    endpoint.stop()
    thread.join(PATIENCE_S)
    assert endpoint.client.last.generation.was_abandoned


def test_failure_unforeseen_is_logged_once_and_the_server_lives() -> None:
    with serving("broken") as server:
        for _ in range(2):
            answer = httpx.post(f"{server.url}/chat/completions", json=body_of(stream=False))
            assert answer.status_code == 500
        server.process.send_signal(signal.SIGTERM)
        assert server.process.stderr is not None
        log = server.process.stderr.read()
        assert server.process.wait(PATIENCE_S) == 0
    assert log.count("ZeroDivisionError: oops") == 2
