"""Raw bytes over real sockets: no 5xx but 503, no hang, and nothing that grows."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
from hypothesis import strategies as st

from nanorun.server.settings import ServerSettings
from tests.fuzz.checking_client import CheckingClient
from tests.fuzz.effort import efforts, fuzz
from tests.fuzz.raw_requests import DEEP, RawRequest, raw_request
from tests.fuzz.seeds import seeds
from tests.support.listening import Live, listening
from tests.support.waiting import PATIENCE_S, wait_until

BODIES = [json.dumps(seed["body"]).encode() for seed in seeds("requests")]


@pytest.fixture
def endpoint() -> Iterator[Live]:
    settings = ServerSettings(drain_s=1, max_body_bytes=2**22)
    with listening(CheckingClient(), settings) as live:
        yield live


@st.composite
def raw_requests(draw: st.DrawFn) -> RawRequest:
    rng = draw(st.randoms(use_true_random=True))
    return raw_request(draw(st.sampled_from(seeds("requests"))), BODIES, rng)


def exchange(url: str, request: RawRequest) -> bytes:
    """Send a request and read to the end of the connection, which must come."""
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 0), PATIENCE_S) as connection:
        # The server may answer and close before it was sent whole.
        with suppress(ConnectionError):
            for piece in request.pieces:
                connection.sendall(piece)
        with suppress(OSError):
            if not request.is_whole:
                connection.shutdown(socket.SHUT_WR)
        answer = b""
        with suppress(ConnectionError):  # but no timeout
            while part := connection.recv(2**16):
                answer += part
    return answer


def status_of(answer: bytes) -> int:
    """The status of an answer; 0 if the connection was closed without one."""
    return int(answer[9:12]) if answer else 0


def check(url: str, request: RawRequest, ends: Counter[int]) -> None:
    """One exchange; what no answer may be is asserted."""
    answer = exchange(url, request)
    status = status_of(answer)
    assert status < 500 or status == 503, answer[:400]
    assert not request.is_whole or status, "a whole request was not answered"
    ends[status] += 1


def tasks_of(endpoint: Live) -> int:
    """Tasks of the endpoint's event loop, but for the one that counts."""

    async def count() -> int:
        return len(asyncio.all_tasks()) - 1

    return asyncio.run_coroutine_threadsafe(count(), endpoint.loop).result(PATIENCE_S)


@efforts(few=200, many=10_000)
def test_raw_requests(endpoint: Live, n_examples: int, caplog: pytest.LogCaptureFixture) -> None:
    n_tasks, n_threads = tasks_of(endpoint), threading.active_count()
    ends: Counter[int] = Counter()
    fuzz(lambda request: check(endpoint.url, request, ends), raw_requests(), n_examples)
    assert ends[200] > n_examples / 50 and ends[400] > n_examples / 10, ends
    health = httpx.get(endpoint.url.removesuffix("/v1") + "/health", timeout=PATIENCE_S).json()
    assert health["status"] == "ok"
    wait_until(lambda: tasks_of(endpoint) <= n_tasks)
    assert threading.active_count() <= n_threads
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert httpx.get(endpoint.url.removesuffix("/v1") + "/health").json()["n_active"] == 0


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"messages":['])
def test_nesting_of_a_hundred_thousand_levels(endpoint: Live, opening: bytes) -> None:
    body = opening * DEEP
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    head += "\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    whole = RawRequest((head.encode() + body,), is_whole=True)
    assert status_of(exchange(endpoint.url, whole)) in (400, 413)
