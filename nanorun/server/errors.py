"""Every failure as the error body that the clients of its API understand."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nanorun.errors import (
    ContextFull,
    EngineDied,
    EngineError,
    MemoryPlanError,
    NanorunError,
    UsageError,
)
from nanorun.file_names import readable
from nanorun.server.paths import near

log = logging.getLogger(__name__)


class ApiError(Exception):
    """A request that is refused or failed, in the API's terms.

    Args:
        status: HTTP status.
        message: What is wrong, for a person.
        type: OpenAI's class of the error.
        code: OpenAI's name of the error, where it has one.
        param: The field that is wrong (`messages[0].content`).
        headers: Further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message = readable(message)  # it may show halves of characters that JSON can spell
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = None if param is None else readable(param)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's JSON body, the same inside a stream of events."""
        fields = {"message": self.message, "type": self.type}
        return {"error": {**fields, "param": self.param, "code": self.code}}

    def response(self, path: str) -> JSONResponse:
        """The whole HTTP response, in the words of the API that `path` belongs to."""
        return JSONResponse(body_for(path, self), status_code=self.status, headers=self.headers)


def invalid(field: str, why: str) -> ApiError:
    """A request whose field cannot be meant as it stands."""
    return ApiError(400, f"{field}: {why}", code="invalid_value", param=field)


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_body(error: ApiError) -> dict[str, Any]:
    """Anthropic's JSON body, the same inside a stream of events."""
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def ollama_body(error: ApiError) -> dict[str, Any]:
    """Ollama's JSON body."""
    return {"error": error.message}


_BODIES = (("/v1/messages", anthropic_body), ("/api/", ollama_body))


def body_for(path: str, error: ApiError) -> dict[str, Any]:
    """An error's JSON body in the words of the API that `path` belongs to."""
    for prefix, body in _BODIES:
        if path.startswith(prefix):
            return body(error)
    return error.body()


def to_api_error(error: Exception) -> ApiError:
    """What a client is told about a failure; an unforeseen one is logged and not described."""
    match error:
        case ApiError():
            return error
        case ContextFull():
            return ApiError(400, _text(error), code="context_length_exceeded", param="messages")
        case UsageError():
            return ApiError(400, _text(error))
        case EngineDied(retry_after_s=wait_s):
            log.warning("%s; the next request starts a new one", _text(error))
            return _server_error(503, _text(error), code="engine_died", retry_after_s=wait_s)
        case EngineError():
            return _server_error(500, _text(error), code="engine_error")
        case MemoryPlanError(retry_after_s=wait_s):
            return _server_error(503, _text(error), code="out_of_memory", retry_after_s=wait_s)
        case NanorunError():
            return _server_error(500, _text(error))
        case _:
            log.error("a request failed", exc_info=error)
            return _server_error(500, "internal error; the server's log has the details")


def _server_error(
    status: int, message: str, *, code: str | None = None, retry_after_s: float | None = None
) -> ApiError:
    headers = {} if retry_after_s is None else {"Retry-After": str(ceil(retry_after_s))}
    return ApiError(status, message, type="server_error", code=code, headers=headers)


def _text(error: NanorunError) -> str:
    return "; ".join((error.message, *error.facts))


def install_handlers(app: FastAPI) -> None:
    """Answer failures of routes, and of routing itself, with a body of their API.

    What nobody foresaw is answered by the gate around them.
    """

    async def on_failure(request: Request, error: Exception) -> JSONResponse:
        return to_api_error(error).response(request.url.path)

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _from_validation(error.errors()).response(request.url.path)

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _from_http(request, error).response(request.url.path)

    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ApiError, on_failure)
    app.add_exception_handler(NanorunError, on_failure)


def _from_http(request: Request, error: HTTPException) -> ApiError:
    """Routing's own errors: no such path, wrong method, a body that is no JSON."""
    where = f"{request.method} {request.url.path}"
    headers = dict(error.headers or {})
    if error.status_code == 404:
        routes = near(request.url.path, _paths(request))
        there_is = f"; there is {', '.join(routes)}" if routes else "; GET / lists what there is"
        message = f"there is no {where}{there_is}"
        return ApiError(404, message, code="unknown_url", headers=headers)
    if error.status_code == 405:
        message = f"{where} is not allowed; use {headers['Allow']}"
        return ApiError(405, message, code="method_not_allowed", headers=headers)
    code = "request_too_large" if error.status_code == 413 else None
    return ApiError(error.status_code, str(error.detail), code=code, headers=headers)


def _paths(request: Request) -> list[str]:
    return list(request.app.openapi()["paths"])


def _from_validation(errors: Sequence[Any]) -> ApiError:
    """The first thing that is wrong with a body; the rest often follows from it."""
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be parsed")
        return ApiError(400, f"the body is not JSON: {reason}", code="invalid_json")
    param = _path(first["loc"])
    if not param:
        return ApiError(400, "the body must be a JSON object, sent as application/json")
    reason = first["msg"].removeprefix("Value error, ")
    return invalid(param, reason)


def _path(loc: Sequence[int | str]) -> str:
    """`("body", "messages", 0, "role")` as `messages[0].role`."""
    text = ""
    for part in loc[1:]:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
