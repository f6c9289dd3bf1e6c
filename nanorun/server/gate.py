"""What is checked before a request reaches a route: who may ask, from where, and how much.

A page in a browser can send requests to 127.0.0.1. By DNS rebinding it can even read the answers:
its own host name is made to point here. Such requests carry that name in `Host` and `Origin`, so
an endpoint for this machine answers only to this machine's names.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanorun.server.errors import ApiError, to_api_error
from nanorun.server.keys import Keyring
from nanorun.server.origins import Origins, is_preflight
from nanorun.server.paths import plain
from nanorun.server.record import RequestRecord, record_of
from nanorun.server.settings import ServerSettings

_OPEN_PATHS = frozenset({"/health"})
"""Asked by process managers, which hold no key; tells nothing worth one."""
_OPEN_HERE = frozenset({"/metrics"})
"""Asked by scrapers of this machine without a key."""

_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Gate:
    """Refuses requests that the settings do not let in."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._origins = Origins(settings)
        self._keys = Keyring(settings.all_keys)
        self._open = _OPEN_PATHS | _OPEN_HERE if settings.is_local else _OPEN_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with an error or pass the request on, by the plain form of its path."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_head = scope["method"] == "HEAD"
        record = record_of(scope)
        scope = _plain_scope(scope)
        reply = _Reply(send, self._headers_for(headers, record), has_body=not is_head)
        try:
            self._origins.check(headers)
            if is_preflight(scope["method"], headers):
                await self._origins.preflight(headers)(scope, receive, reply)
                return
            if scope["path"] not in self._open:
                self._check_key(headers, record)
            await self._app(scope, self._limit(headers, receive, record), reply)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, reply)
        except Exception as error:
            # The framework would answer past this gate, without the headers that a page needs.
            told = to_api_error(error)
            if not reply.has_begun:
                await told.response(scope["path"])(scope, receive, reply)
            raise
        finally:
            # The router, within, leaves it there.
            record.route = getattr(scope.get("route"), "path", None)

    def _headers_for(self, headers: Headers, record: RequestRecord) -> dict[str, str]:
        """What every answer to a request carries."""
        cors = self._origins.headers_for(headers.get("origin"))
        may_read = "Access-Control-Allow-Origin" in cors
        policy = {"Cross-Origin-Resource-Policy": "cross-origin"} if may_read else {}
        return {"x-request-id": record.id, **_SECURITY_HEADERS, **policy, **cors}

    def _check_key(self, headers: Headers, record: RequestRecord) -> None:
        """Note whose request it is."""
        if not self._keys:
            return
        record.key = self._keys.name_of(_given_key(headers))
        if record.key is None:
            raise ApiError(
                401,
                "a valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _limit(self, headers: Headers, receive: Receive, record: RequestRecord) -> Receive:
        """Count the body while it arrives; a length that is announced is refused unread."""
        limit = self._settings.max_body_bytes
        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            raise _too_large(limit)

        async def receive_within() -> Message:
            message = await receive()
            record.n_body_bytes += len(message.get("body", b""))
            if record.n_body_bytes > limit:
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


def _given_key(headers: Headers) -> bytes:
    """The key of a request: as a bearer's token or, as Anthropic's clients do, in x-api-key."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = headers.get("x-api-key", "")
    # Header bytes come decoded as Latin-1; a key typed as UTF-8 is compared by its bytes.
    return given.strip().encode("latin-1")


def _plain_scope(scope: Scope) -> Scope:
    """The request as the routes know it. HEAD is answered as GET is, without the body."""
    path = plain(scope["path"])
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "path": path, "raw_path": path.encode(), "method": method}


class _Reply:
    """Sends an answer with further headers, and without its body where none is wanted."""

    def __init__(self, send: Send, headers: Mapping[str, str], *, has_body: bool) -> None:
        self.has_begun = False
        self._send = send
        self._headers = headers
        self._has_body = has_body

    async def __call__(self, message: Message) -> None:
        """Send a part of it."""
        if message["type"] == "http.response.start":
            self.has_begun = True
            headers = MutableHeaders(scope=message)
            headers.update(self._headers)
            headers.setdefault("Cache-Control", "no-store")
        elif not self._has_body:
            message = {**message, "body": b""}
        await self._send(message)
