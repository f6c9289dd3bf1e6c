"""The HTTP side of a remote endpoint: its address, its key, requests, and patience."""

from __future__ import annotations

import ipaddress
import json
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
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

    async def get_json(self, path: str) -> Any:
        """The JSON at a path below the base.

        Raises:
            NanorunError: If there is none.
        """
        return await self._json("GET", path, None)

    async def post_json(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON answer to a JSON body.

        Raises:
            NanorunError: If there is none.
        """
        return await self._json("POST", path, body)

    async def _json(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        url = self._url(path)
        async with self._response(method, url, body) as response:
            return self.parse_body(url, await self._read(url, response))

    @asynccontextmanager
    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[httpx.Response]:
        """A response whose body is read by `pieces`, while it arrives.

        Raises:
            EndpointBusy: If the endpoint asks to come back later.
            NanorunError: If it refuses or cannot be reached.
        """
        async with self._response("POST", self._url(path), body) as response:
            yield response

    async def pieces(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        """The bytes of a response as they come.

        Raises:
            EngineDied: If the connection breaks.
        """
        try:
            async for piece in response.aiter_bytes():
                yield piece
        except httpx.DecodingError as error:
            raise EngineError(f"{response.url} sent what cannot be decoded: {error}") from error
        except httpx.TransportError as error:
            raise self._broken(str(response.url), error) from error

    async def whole(self, response: httpx.Response) -> Any:
        """The JSON body of a response to a request for a stream.

        Raises:
            EngineError: If it is no JSON.
        """
        url = str(response.url)
        return self.parse_body(url, await self._read(url, response))

    def parse_body(self, url: str, text: str) -> Any:
        """A body as JSON.

        Raises:
            EngineError: If it is none: whatever is at that address is no such endpoint.
        """
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            start = " ".join(text[:120].split())
            raise EngineError(
                f"{url} does not answer as an OpenAI-style endpoint",
                facts=[f"its answer begins: {start}" if start else "its answer is empty"],
            ) from error

    @asynccontextmanager
    async def _response(
        self, method: str, url: str, body: Mapping[str, Any] | None
    ) -> AsyncIterator[httpx.Response]:
        request = self._client().build_request(method, url, json=body)
        try:
            response = await self._client().send(request, stream=True)
        except httpx.TransportError as error:
            raise self._broken(url, error) from error
        try:
            if not response.is_success:
                text = self._without_key(await self._read(url, response))
                raise error_from_response(url, response, text)
            yield response
        finally:
            await response.aclose()

    async def _read(self, url: str, response: httpx.Response) -> str:
        data = bytearray()
        async for piece in self.pieces(response):
            data += piece
            if len(data) > _MAX_BODY_BYTES:
                raise EngineError(f"the answer of {url} is longer than {_MAX_BODY_BYTES} bytes")
        return data.decode("utf-8", "replace")

    def _broken(self, url: str, error: httpx.TransportError) -> Exception:
        return error_from_transport(url, error, self.settings.read_timeout_s)

    def _without_key(self, text: str) -> str:
        """Some endpoints repeat the key they refuse."""
        return text.replace(self._key, "***") if self._key else text

    def _url(self, path: str) -> str:
        return f"{self.address.base}/{path}"

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
