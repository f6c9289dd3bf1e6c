"""Which names the endpoint answers to, and which pages in a browser may ask it and read answers."""

from __future__ import annotations

from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response

from nanorun.server.errors import ApiError
from nanorun.server.settings import ServerSettings, is_loopback

_ANY = "*"
_METHODS = "GET, HEAD, POST, DELETE, OPTIONS"
_MAX_AGE_S = 600
_EXPOSED = "x-request-id, retry-after"


class Origins:
    """The rules about `Host` and `Origin` of one endpoint."""

    def __init__(self, settings: ServerSettings) -> None:
        self._is_local = settings.is_local
        self._hosts = {host.lower() for host in settings.allow_hosts}
        self._origins = {origin.lower().rstrip("/") for origin in settings.allow_origins}

    def check(self, headers: Headers) -> None:
        """Refuse a request by a foreign name, or from a page that may not ask.

        Raises:
            ApiError: 403, with the command that would let it in.
        """
        self._check_host(headers.get("host", ""))
        origin = headers.get("origin")
        if origin is None or not self._is_local or self.allows(origin):
            return
        if not is_loopback(_host_name(origin)):
            raise _forbidden(
                f"origin {origin!r} is not a page of this machine", "--allow-origin", origin
            )

    def _check_host(self, host: str) -> None:
        if _ANY in self._hosts or not (self._is_local or self._hosts):
            return
        name = _host_name(f"//{host}")
        if name not in self._hosts and not is_loopback(name):
            problem = f"host {host!r} is not a name of this endpoint"
            raise _forbidden(problem, "--allow-host", name)

    def allows(self, origin: str) -> bool:
        """Whether pages of an origin may read answers."""
        return _ANY in self._origins or origin.lower() in self._origins

    def preflight(self, headers: Headers) -> Response:
        """What a browser is told that asks on a page's behalf before it sends the request.

        Raises:
            ApiError: 403, with the command that would let the page in.
        """
        origin = headers["origin"]
        if not self.allows(origin):
            raise _forbidden(f"pages of {origin!r} may not read answers", "--allow-origin", origin)
        answer = {
            "Access-Control-Allow-Methods": _METHODS,
            "Access-Control-Max-Age": str(_MAX_AGE_S),
        }
        if asked := headers.get("access-control-request-headers"):
            answer["Access-Control-Allow-Headers"] = asked
        if headers.get("access-control-request-private-network") == "true":
            answer["Access-Control-Allow-Private-Network"] = "true"
        return Response(status_code=HTTPStatus.NO_CONTENT, headers=answer)

    def headers_for(self, origin: str | None) -> dict[str, str]:
        """What lets a page read an answer; nothing unless its origin is allowed."""
        if not self._origins:
            return {}
        # Or a cache would give one origin's answer to another.
        varies = {"Vary": "Origin"}
        if origin is None or not self.allows(origin):
            return varies
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": _EXPOSED,
            **varies,
        }


def is_preflight(method: str, headers: Headers) -> bool:
    """Whether a browser asks if a page may send a request."""
    return method == "OPTIONS" and {"origin", "access-control-request-method"} <= set(headers)


def _forbidden(problem: str, flag: str, value: str) -> ApiError:
    remedy = (
        f" (to let it in: nanorun serve {flag} '{value}')" if value.isprintable() and value else ""
    )
    return ApiError(403, problem + remedy, code="forbidden")


def _host_name(url: str) -> str:
    """The host of an address without its port; empty if there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
