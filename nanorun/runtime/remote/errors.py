"""What goes wrong with an endpoint, in nanorun's words: always with its address, never its key."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from nanorun.errors import ContextFull, EngineDied, EngineError, NanorunError, UsageError

KEY_VARIABLE = "NANORUN_API_KEY"
_MAX_DETAIL = 400
# llama.cpp and OpenAI name it in `type` or `code`; vLLM only says it in its message.
_CONTEXT = re.compile(
    r"context_length_exceeded|exceed_context_size|maximum context length|max_model_len", re.I
)
_MODEL = re.compile(r"\bmodel\b", re.I)
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


def error_from_body(url: str, status: int | None, body: Any) -> NanorunError:
    """The error of a response's JSON body, or of a chunk of its stream.

    Args:
        url: The address that answered.
        status: The response's HTTP status; None inside a stream.
        body: The parsed body; anything.
    """
    detail, code = detail_of(body)
    text = f"{code} {detail}"
    kind = status or _status_in(body)
    if _CONTEXT.search(text):
        return ContextFull(f"the prompt does not fit the context of {url}", facts=[detail])
    if code == "engine_died":
        return EngineDied(f"the engine behind {url} died", facts=[detail])
    if kind in (401, 403):
        return _refused_key(url, kind, detail)
    if kind == 404 and _MODEL.search(text):
        return UsageError(f"{url} does not have that model", facts=_facts(detail))
    if kind == 404:
        return EngineError(f"there is nothing at {url} (404)", facts=_facts(detail))
    if kind in (400, 413, 422):
        return UsageError(f"{url} refused the request ({kind})", facts=_facts(detail))
    where = "failed in mid-answer" if status is None else f"failed ({status})"
    return EngineError(f"{url} {where}", facts=_facts(detail))


def _refused_key(url: str, status: int, detail: str) -> EngineError:
    return EngineError(
        f"{url} refused the API key, or asks for one ({status})",
        facts=[*_facts(detail), f"the key is read from {KEY_VARIABLE}"],
    )


def _facts(detail: str) -> list[str]:
    return [detail] if detail else []


def detail_of(body: Any) -> tuple[str, str]:
    """What an error body says, in the many places they say it: the message and the code."""
    error = body.get("error", body) if isinstance(body, Mapping) else body
    if not isinstance(error, Mapping):
        return _short(error if isinstance(error, str) else ""), ""
    message = error.get("message") or error.get("detail") or error.get("msg") or ""
    code = error.get("code")
    names = (code if isinstance(code, str) else "", str(error.get("type") or ""))
    text = message if isinstance(message, str) else json.dumps(message)
    return _short(text), " ".join(name for name in names if name)


def _status_in(body: Any) -> int | None:
    """An HTTP status that an error inside a stream carries as its code (llama.cpp, vLLM)."""
    error = body.get("error") if isinstance(body, Mapping) else None
    code = error.get("code") if isinstance(error, Mapping) else None
    return code if isinstance(code, int) else None


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
        detail, code = detail_of(body)
        if "engine_died" not in code or response.headers.get("retry-after"):
            message = f"{url} takes no request now ({status})" + (f": {detail}" if detail else "")
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
