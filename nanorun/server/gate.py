"""What is checked before a request reaches a route: who may ask, from where, and how much.

A page in a browser can send requests to 127.0.0.1. By DNS rebinding it can even read the answers:
its own host name is made to point here. Such requests carry that name in `Host` and `Origin`, so
an endpoint for this machine answers only to this machine's names.
"""

from __future__ import annotations

import hmac
from contextlib import suppress
from urllib.parse import urlsplit

from fastapi import HTTPException
from h11 import LocalProtocolError
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanorun.server.errors import ApiError
from nanorun.server.settings import ServerSettings, is_loopback

_OPEN_PATHS = frozenset({"/health"})
"""Asked by process managers, which hold no key; tells nothing worth one."""


class Gate:
    """Refuses requests that the settings do not let in."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with an error or a preflight's answer, or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "path": plain_path(scope["path"])}
        headers = Headers(scope=scope)
        shared = self._shared(headers, send)
        try:
            is_preflight = scope["method"] == "OPTIONS"
            self._check_names(headers, is_preflight=is_preflight)
            if is_preflight:  # browsers send it without the key
                await Response(status_code=204, headers=_preflight(headers))(scope, receive, shared)
                return
            if scope["path"] not in _OPEN_PATHS:
                self._check_key(headers)
            limited = self._limit(headers, receive)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, shared)
            return
        await self._app(scope, limited, shared)

    def _shared(self, headers: Headers, send: Send) -> Send:
        """Marks answers as readable by the page that asked, if it is an allowed one."""
        origin = headers.get("origin")
        is_allowed = origin is not None and self._allows(origin)

        async def send_shared(message: Message) -> None:
            if message["type"] == "http.response.start":
                made = MutableHeaders(scope=message)
                made["X-Content-Type-Options"] = "nosniff"
                made.setdefault("Cache-Control", "no-store")
                made.add_vary_header("Origin")
                if is_allowed:
                    made["Access-Control-Allow-Origin"] = str(origin)
                    made["Access-Control-Expose-Headers"] = "Retry-After"
            # uvicorn itself has refused the rest of a request whose chunks are wrong, and hung up.
            with suppress(LocalProtocolError):
                await send(message)

        return send_shared

    def _allows(self, origin: str) -> bool:
        is_own = self._settings.is_local and is_loopback(_host_name(origin))
        return is_own or self._settings.allows_origin(origin)

    def _check_names(self, headers: Headers, *, is_preflight: bool) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _host_name(f"//{host}")
        names = {known.lower() for known in self._settings.allowed_hosts}
        if self._settings.is_local and not is_loopback(name) and not names & {name, "*"}:
            raise _forbidden(
                f"host {host!r} is not a name of this machine; if it is meant to be one, start"
                f" nanorun serve --allow-host {name or 'NAME'}"
            )
        if origin is None or self._allows(origin):
            return
        # Beyond loopback a key is asked for, which a page of elsewhere does not have.
        if self._settings.is_local or is_preflight:
            raise _forbidden(
                f"origin {origin!r} is not a page of this machine; if it may ask, start"
                f" nanorun serve --allow-origin {origin}"
            )

    def _check_key(self, headers: Headers) -> None:
        if not self._keys:
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # Header bytes come decoded as Latin-1; a key typed as UTF-8 is compared by its bytes.
        token = given.strip().encode("latin-1")
        is_known = False
        # Every key is compared in full, so that the time taken tells nothing about any of them.
        for key in self._keys:
            is_known |= hmac.compare_digest(token, key)
        if not is_known:
            raise ApiError(
                401,
                "a valid API key is needed: Authorization: Bearer KEY (or x-api-key: KEY)",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _limit(self, headers: Headers, receive: Receive) -> Receive:
        """Count the body while it arrives; a length that is announced is refused unread."""
        limit = self._settings.max_body_bytes
        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            raise _too_large(limit)
        n_read = 0

        async def receive_within() -> Message:
            nonlocal n_read
            message = await receive()
            n_read += len(message.get("body", b""))
            if n_read > limit:
                raise _BodyTooLarge(limit)
            return message

        return receive_within


def plain_path(path: str) -> str:
    """A path as routes have it: `//v1/models/` and `/v1/v1/models` are `/v1/models`."""
    plain = "/" + "/".join(part for part in path.split("/") if part)
    while plain.startswith("/v1/v1/"):
        plain = plain.removeprefix("/v1")
    return plain


def _preflight(headers: Headers) -> dict[str, str]:
    """What a browser is told before it lets a page ask."""
    return {
        "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
        "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "*"),
        "Access-Control-Allow-Private-Network": "true",
        "Access-Control-Max-Age": "600",
    }


class _BodyTooLarge(HTTPException):
    """Raised where the body is read; FastAPI lets only its own exceptions out of there."""

    def __init__(self, limit: int) -> None:
        error = _too_large(limit)
        super().__init__(error.status, error.message, error.headers)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limit} bytes",
        code="request_too_large",
        # Or the rest of the body would be read after all, to reach the next request.
        headers={"Connection": "close"},
    )


def _forbidden(message: str) -> ApiError:
    return ApiError(403, message, code="forbidden")


def _host_name(url: str) -> str:
    """The host of an address without its port; empty if there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
