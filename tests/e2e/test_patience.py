"""Clients that read or send too slowly, on real sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import httpx
import pytest

from nanorun.model.chat import TextDelta
from tests.e2e.conftest import Live
from tests.support.fakes import reply
from tests.support.waiting import PATIENCE_S, wait_until

Start = Callable[..., Live]
HEAD = (
    "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    "Content-Length: {length}\r\n\r\n"
)
FLOOD = [TextDelta("x" * 10_000)] * 3_000
"""30 MB: more than what the kernel holds for a client that reads nothing."""


@contextmanager
def connected(live: Live) -> Iterator[socket.socket]:
    """A connection whose own buffer is small."""
    address = httpx.URL(live.url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE_S)
        connection.connect((address.host, address.port or 0))
        yield connection


def request(path: str, body: dict[str, object]) -> bytes:
    text = json.dumps(body).encode()
    return HEAD.format(path=path, length=len(text)).encode() + text


ASKED = [{"role": "user", "content": "x"}]
STREAMS = {
    "/v1/chat/completions": {"messages": ASKED, "stream": True},
    "/v1/completions": {"prompt": "x", "stream": True},
    "/v1/messages": {"messages": ASKED, "max_tokens": 9, "stream": True},
    "/api/chat": {"messages": ASKED},
}


@pytest.mark.parametrize("path", STREAMS)
def test_client_that_does_not_read_is_let_go(live: Start, path: str) -> None:
    endpoint = live(FLOOD, reply("x"), write_timeout_s=0.3, log_requests=True)
    with connected(endpoint) as connection:
        connection.sendall(request(path, STREAMS[path]))
        wait_until(lambda: bool(endpoint.client.requests))
        generation = endpoint.client.last.generation
        # Others are answered meanwhile.
        url = f"{endpoint.url}/chat/completions"
        other = httpx.post(url, json={"messages": ASKED}, timeout=PATIENCE_S)
        assert other.json()["choices"][0]["message"]["content"] == "x"
        wait_until(lambda: generation.was_abandoned)
        # Not all was made that was asked for: the reader held its maker back.
        assert len(generation.sent) < len(FLOOD)
        with pytest.raises(ConnectionError):
            while connection.recv(2**16):
                pass


def test_client_that_reads_slowly_is_served_to_the_end(live: Start) -> None:
    endpoint = live([*FLOOD[:300], *reply("end")], write_timeout_s=3)
    body = {"messages": ASKED, "stream": True}
    text = b""
    with connected(endpoint) as connection:
        connection.sendall(request("/v1/chat/completions", body))
        while b"[DONE]" not in text[-100:]:
            piece = connection.recv(2**16)
            assert piece
            text += piece
            time.sleep(0.005)  # all of it takes several times the timeout
    assert b"end" in text[-2000:]


def test_body_that_trickles_in_is_refused(live: Start) -> None:
    endpoint = live(reply("x"), read_timeout_s=0.5)
    with connected(endpoint) as connection:
        connection.sendall(HEAD.format(path="/v1/chat/completions", length=10**6).encode())
        answer = b""
        connection.settimeout(0.02)
        deadline = time.monotonic() + PATIENCE_S
        while not answer and time.monotonic() < deadline:
            with suppress(TimeoutError):
                connection.sendall(b" ")
                answer = connection.recv(2**16)
        connection.settimeout(PATIENCE_S)
        with suppress(ConnectionError):  # it was still sent bytes that nobody reads
            while piece := connection.recv(2**16):
                answer += piece
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer.lower()
    assert endpoint.client.requests == []


@pytest.mark.parametrize("head", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: local"])
def test_head_that_never_ends_is_let_go(live: Start, head: bytes) -> None:
    endpoint = live(reply("x"), read_timeout_s=0.2)
    with connected(endpoint) as connection:
        connection.sendall(head)
        with suppress(ConnectionError):
            assert connection.recv(100) == b""


def test_answer_may_take_longer_than_a_request(live: Start) -> None:
    endpoint = live([0.6, *reply("late")], read_timeout_s=0.2, write_timeout_s=0.2)
    with httpx.Client(timeout=PATIENCE_S) as client:
        for _ in range(2):  # the second on the same connection
            answer = client.post(f"{endpoint.url}/chat/completions", json={"messages": ASKED})
            assert answer.json()["choices"][0]["message"]["content"] == "late"
