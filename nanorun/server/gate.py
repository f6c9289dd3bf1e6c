"""What is checked before a request reaches a route: who may ask, from where, and how much.

A page in a browser can send requests to 127.0.0.1. By DNS rebinding it can even read the answers:
its own host name is made to point here. Such requests carry that name in `Host` and `Origin`, so
an endpoint for this machine answers only to this machine's names.
"""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers
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
        """Answer with an error or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_names(headers)
            if scope["path"] not in _OPEN_PATHS:
                self._check_key(headers)
            limited = self._limit(headers, receive)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        await self._app(scope, limited, send)

    def _check_names(self, headers: Headers) -> None:
        if not self._settings.is_local:
            return
        if not is_loopback(_host_name(f"//{headers.get('host', '')}")):
            raise _forbidden(f"host {headers.get('host', '')!r} is not a name of this machine")
        origin = headers.get("origin")
        if origin is not None and not is_loopback(_host_name(origin)):
            raise _forbidden(f"origin {origin!r} is not a page of this machine")

    def _check_key(self, headers: Headers) -> None:
        if not self._keys:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Header bytes come decoded as Latin-1; a key typed as UTF-8 is compared by its bytes.
        token = given.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
        is_known = False
        # Every key is compared in full, so that the time taken tells nothing about any of them.
        for key in self._keys:
            is_known |= hmac.compare_digest(token, key)
        if not is_known:
            raise ApiError(
                401,
                "a valid API key is needed: Authorization: Bearer KEY",
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
