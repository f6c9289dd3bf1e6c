"""The HTTP side of a remote endpoint: its address, its key, requests, and patience."""

from __future__ import annotations

import ipaddress
import json
import os
import ssl
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from nanorun.errors import EngineError, LibraryError, UsageError
from nanorun.runtime.remote.errors import (
    KEY_VARIABLE,
    EndpointBusy,
    error_from_response,
    error_from_transport,
)
from nanorun.runtime.remote.sse import DONE, SseData, SseDecoder, SseItem

_MAX_BODY_BYTES = 16 * 2**20
_ROUTES = ("/chat/completions", "/completions", "/models")


@dataclass(frozen=True, slots=True)
class RemoteSettings:
    """How long to wait for an endpoint, and how often to ask it."""

    connect_timeout_s: float = 10.0
    read_timeout_s: float = 600.0
    """Silence after which it is given up; reading a million tokens takes minutes."""
    n_attempts: int = 4
    """Times a request is sent while the endpoint says that it is busy."""
    backoff_s: float = 0.5
    """Wait before the second attempt, doubled for each one after it."""
    longest_wait_s: float = 60.0
    """An endpoint that asks for more patience than this is given up at once."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where an endpoint is."""

    base: str
    """`http://host:port/v1`, without a slash at its end."""
    host: str

    @property
    def shown(self) -> str:
        """What people are shown: `host:port`, and the path where it is not `/v1`."""
        place = self.base.partition("://")[2]
        return place.removesuffix("/v1")

    @property
    def is_loopback(self) -> bool:
        """Whether it is on this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def parse_address(text: str) -> Address:
    """The address that `--endpoint` names.

    `host:port`, `http://host:port`, `.../v1` and `.../v1/chat/completions` mean the same.

    Raises:
        UsageError: If it is none, or holds what could be a secret and would be shown.
    """
    url = text.strip()
    if "://" not in url:
        url = f"http://{url}"
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"the endpoint's address cannot be read: {error}") from error
    if parts.username is not None or parts.password is not None or parts.query:
        raise UsageError(
            "the endpoint's address holds a user, a password or a query",
            facts=[f"a key belongs into {KEY_VARIABLE}, where nobody sees it"],
        )
    if parts.scheme not in ("http", "https") or not host or not url.isprintable() or " " in url:
        raise UsageError(
            f"{text!r} is no address of an endpoint",
            tries=["nanorun chat --endpoint http://127.0.0.1:8080"],
        )
    path = parts.path.rstrip("/")
    for route in _ROUTES:
        path = path.removesuffix(route)
    last = path.rpartition("/")[2]
    if not (last.startswith("v") and last[1:].isdigit()):
        path += "/v1"
    return Address(f"{parts.scheme}://{parts.netloc}{path}", host)


def key_from_environment() -> str | None:
    """The key to send, from `NANORUN_API_KEY` alone.

    Keys of other programs, `OPENAI_API_KEY` among them, are for other endpoints.

    Raises:
        UsageError: If no header can carry it.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        return None
    if not key.isascii() or not key.isprintable():
        raise UsageError(f"{KEY_VARIABLE} holds characters that cannot be sent")
    return key


class Response:
    """The answer to a request, read while it arrives.

    Args:
        response: Opened for streaming; its headers have come.
        timeout_s: Silence after which its connection is given up, for the error.
    """

    def __init__(self, response: httpx.Response, timeout_s: float) -> None:
        self.url = str(response.url)
        kind = response.headers.get("content-type", "")
        self.is_stream = "json" not in kind and "html" not in kind
        """Whether it may be a stream of events, and not one whole."""
        self._bytes = response.aiter_bytes()
        self._timeout_s = timeout_s
        self._decoder = SseDecoder()
        self._items: deque[SseItem] = deque()
        self._ended = False

    async def item(self) -> SseItem | None:
        """The next item of a stream of events; None at its end.

        Raises:
            EngineDied: If the connection breaks.
            EngineError: If the bytes cannot be decoded, or a line never ends.
        """
        while not self._items and not self._ended:
            piece = await self._read()
            if piece is None:
                self._ended = True
                self._items += filter(_is_whole, self._decoder.finish())
            else:
                self._items += self._decoder.feed(piece)
        return self._items.popleft() if self._items else None

    async def text(self) -> str:
        """The whole body.

        Raises:
            EngineDied: If the connection breaks.
            EngineError: If the body cannot be decoded, or is too long.
        """
        data = bytearray()
        while (piece := await self._read()) is not None:
            data += piece
            if len(data) > _MAX_BODY_BYTES:
                raise EngineError(
                    f"the answer of {self.url} is longer than {_MAX_BODY_BYTES} bytes"
                )
        return data.decode("utf-8", "replace")

    async def json(self) -> Any:
        """The whole body as JSON.

        Raises:
            EngineError: If it is none: whatever is at that address is no such endpoint.
        """
        text = await self.text()
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            start = " ".join(text[:120].split())
            raise EngineError(
                f"{self.url} does not answer as an OpenAI-style endpoint",
                facts=[f"its answer begins: {start}" if start else "its answer is empty"],
            ) from error

    async def _read(self) -> bytes | None:
        try:
            return await anext(self._bytes, None)
        except httpx.DecodingError as error:
            raise EngineError(f"{self.url} sent what cannot be decoded: {error}") from error
        except httpx.TransportError as error:
            raise error_from_transport(self.url, error, self._timeout_s) from error


def _is_whole(item: SseItem) -> bool:
    """Whether the last item of a stream, which lacks its blank line, was not cut in two."""
    if not isinstance(item, SseData):
        return False
    if item.text.strip() == DONE:
        return True
    try:
        json.loads(item.text)
    except (ValueError, RecursionError):
        return False
    return True


class Endpoint:
    """Sends requests to one endpoint and turns what goes wrong into nanorun's errors.

    Each request has a connection of its own: closing it is how a reply is cancelled, and none is
    left over that the endpoint may have closed meanwhile.

    Args:
        address: Where it is.
        key: What it asks for, if anything.
        settings: How patient to be.
    """

    def __init__(self, address: Address, key: str | None, settings: RemoteSettings) -> None:
        self.address = address
        self.settings = settings
        self._key = key
        self._http: httpx.AsyncClient | None = None

    async def close(self) -> None:
        """Close all connections."""
        http, self._http = self._http, None
        if http is not None:
            await http.aclose()

    async def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON answer to a request, its path below the base.

        Raises:
            NanorunError: If there is none.
        """
        async with self.request(method, path, body) as response:
            return await response.json()

    @asynccontextmanager
    async def request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> AsyncIterator[Response]:
        """The response to a request, open for a `with` block.

        Raises:
            EndpointBusy: If the endpoint asks to come back later.
            EndpointRefused: If it refuses what was asked.
            NanorunError: If it cannot be reached, or fails.
        """
        url, timeout_s = f"{self.address.base}/{path}", self.settings.read_timeout_s
        request = self._client().build_request(method, url, json=body)
        try:
            response = await self._client().send(request, stream=True)
        except httpx.TransportError as error:
            raise error_from_transport(url, error, timeout_s) from error
        try:
            opened = Response(response, timeout_s)
            if not response.is_success:
                raise error_from_response(url, response, self._without_key(await opened.text()))
            yield opened
        finally:
            await response.aclose()

    def _without_key(self, text: str) -> str:
        """Some endpoints repeat the key they refuse."""
        return text.replace(self._key, "***") if self._key else text

    def _client(self) -> httpx.AsyncClient:
        if self._http is None:
            try:
                self._http = self._new_client()
            except (ImportError, ValueError) as error:
                # A proxy of a kind that needs another package, or of no known kind.
                raise LibraryError(
                    f"the proxy of the environment cannot be used: {error}"
                ) from error
        return self._http

    def _new_client(self) -> httpx.AsyncClient:
        headers = {"Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        settings = self.settings
        is_plain = self.address.base.startswith("http://")
        return httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(
                settings.read_timeout_s, connect=settings.connect_timeout_s, pool=None
            ),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            # A proxy of the environment cannot reach this machine's loopback.
            trust_env=not self.address.is_loopback,
            # Reading the certificates takes 20 ms, for nothing where there is no TLS.
            verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if is_plain else True,
        )


def wait_before(attempt: int, busy: EndpointBusy, settings: RemoteSettings) -> float | None:
    """Seconds to wait before the next attempt; None if there is no point in one.

    Args:
        attempt: Attempts made so far.
        busy: How the last one ended.
        settings: The limits.
    """
    wait_s = busy.wait_s
    if wait_s is None:
        wait_s = settings.backoff_s * 2 ** (attempt - 1)
    if attempt >= settings.n_attempts or wait_s > settings.longest_wait_s:
        return None
    return wait_s
