"""What goes wrong with an endpoint, in nanorun's words: always with its address, never its key."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from nanorun.errors import ContextFull, EngineDied, EngineError, NanorunError, UsageError

KEY_VARIABLE = "NANORUN_API_KEY"
_MAX_DETAIL = 400
# What OpenAI and llama.cpp call it in `code` or `type`, vLLM in `param`.
_CONTEXT_CODES = ("context_length_exceeded", "exceed_context_size_error")
_CONTEXT_PARAM = "input_tokens"
# Older vLLM gives neither, and of a model that it does not have not even `param`. These choose the
# words in which a refusal is told, never what is done about it.
_CONTEXT_WORDS = re.compile(r"maximum context length|max_model_len", re.I)
_MODEL_WORDS = re.compile(r"\bmodel\b", re.I)
BUSY = frozenset({429, 502, 503, 504, 529})
"""Answers that may be another one a moment later."""


class EndpointBusy(EngineError):
    """The endpoint takes no request now.

    Args:
        message: What it said.
        wait_s: How long it asks to wait, if it says so.
    """

    def __init__(self, message: str, wait_s: float | None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class NothingThere(EngineError):
    """The endpoint does not have the route."""


class EndpointRefused(UsageError):
    """The endpoint does not take a request as it is.

    Args:
        message: What happened.
        said: What the endpoint said of it.
    """

    def __init__(self, message: str, said: Said) -> None:
        super().__init__(message, facts=said.facts)
        self.param = said.param
        """The field of the request that it names, if it names one."""


@dataclass(frozen=True, slots=True)
class Said:
    """What the body of an error says, in the many places where endpoints say it."""

    message: str
    code: str = ""
    type: str = ""
    param: str | None = None
    """The field of the request at fault."""
    status: int | None = None
    """The HTTP status, where an error inside a stream carries one (llama.cpp, vLLM)."""

    @property
    def facts(self) -> list[str]:
        """For people."""
        return [self.message] if self.message else []

    @property
    def is_about_context(self) -> bool:
        """Whether the prompt was too long."""
        known = self.code in _CONTEXT_CODES or self.type in _CONTEXT_CODES
        return known or self.param == _CONTEXT_PARAM or bool(_CONTEXT_WORDS.search(self.message))

    @property
    def is_about_model(self) -> bool:
        """Whether there is no such model, given that there is no such something."""
        known = self.code == "model_not_found" or self.param == "model"
        return known or bool(_MODEL_WORDS.search(self.message))


def error_from_body(url: str, status: int | None, body: Any) -> NanorunError:
    """The error of a response's JSON body, or of a chunk of its stream.

    Args:
        url: The address that answered.
        status: The response's HTTP status; None inside a stream.
        body: The parsed body; anything.
    """
    said = said_in(body)
    if said.is_about_context:
        return ContextFull(f"the prompt does not fit the context of {url}", facts=[said.message])
    if said.code == "engine_died":
        return EngineDied(f"the engine behind {url} died", facts=[said.message])
    match status or said.status:
        case 401 | 403 as kind:
            return _refused_key(url, kind, said)
        case 404 if said.is_about_model:
            return UsageError(f"{url} does not have that model", facts=said.facts)
        case 404:
            return NothingThere(f"there is nothing at {url} (404)", facts=said.facts)
        case 400 | 413 | 422 as kind:
            return EndpointRefused(f"{url} refused the request ({kind})", said)
    where = "failed in mid-answer" if status is None else f"failed ({status})"
    return EngineError(f"{url} {where}", facts=said.facts)


def _refused_key(url: str, status: int, said: Said) -> EngineError:
    return EngineError(
        f"{url} refused the API key, or asks for one ({status})",
        facts=[*said.facts, f"the key is read from {KEY_VARIABLE}"],
    )


def said_in(body: Any) -> Said:
    """What an error body says: OpenAI's form, FastAPI's, plain text, or nothing of use."""
    error = body.get("error", body) if isinstance(body, Mapping) else body
    if not isinstance(error, Mapping):
        return Said(_short(error) if isinstance(error, str) else "")
    message = error.get("message") or error.get("detail") or error.get("msg") or ""
    code, param = error.get("code"), error.get("param")
    return Said(
        _short(message if isinstance(message, str) else json.dumps(message)),
        code=code if isinstance(code, str) else "",
        type=str(error.get("type") or ""),
        param=param if isinstance(param, str) and param else _fastapi_field(message),
        status=code if isinstance(code, int) and body is not error else None,
    )


def _fastapi_field(detail: Any) -> str | None:
    """The field that FastAPI's list of what is wrong names first: `loc` is a path to it."""
    first = detail[0] if isinstance(detail, list) and detail else None
    path = first.get("loc") if isinstance(first, Mapping) else None
    field = path[-1] if isinstance(path, list) and path else None
    return field if isinstance(field, str) else None


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_DETAIL else f"{line[:_MAX_DETAIL]} ..."


def error_from_response(url: str, response: httpx.Response, text: str) -> NanorunError:
    """The error of a response that is none of success, its body already read."""
    status = response.status_code
    if response.is_redirect:
        target = response.headers.get("location", "elsewhere")
        return EngineError(f"{url} redirects to {target}; give the address that answers")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = "" if "<html" in text.lower() else text
    if status in BUSY:
        said = said_in(body)
        if said.code != "engine_died" or response.headers.get("retry-after"):
            message = f"{url} takes no request now ({status})"
            message += f": {said.message}" if said.message else ""
            return EndpointBusy(message, retry_after_s(response))
    return error_from_body(url, status, body)


def retry_after_s(response: httpx.Response) -> float | None:
    """The seconds that `Retry-After` asks for; it may also name a date."""
    value = response.headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def error_from_transport(url: str, error: httpx.TransportError, timeout_s: float) -> NanorunError:
    """The error of a connection that could not be made, or broke."""
    match error:
        case httpx.ConnectTimeout():
            return EngineDied(f"{url} cannot be reached: no connection in time")
        case httpx.ReadTimeout():
            return EngineDied(f"{url} has sent nothing for {timeout_s:g} s")
        case httpx.ConnectError():
            return EngineDied(f"{url} cannot be reached: {reason_of(error)}")
        case httpx.UnsupportedProtocol():
            return UsageError(f"{url} is no http or https address")
        case _:
            return EngineDied(f"{url} broke the connection", facts=[reason_of(error)])


def reason_of(error: BaseException) -> str:
    """The system's own words, which lie at the bottom of a chain of exceptions."""
    reason = str(error) or type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror) and cause.strerror:
            reason = cause.strerror
        elif isinstance(cause, ConnectionError | TimeoutError) and cause.errno:
            # asyncio puts words of its own into `strerror`.
            reason = os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__
    return reason[:1].lower() + reason[1:]
