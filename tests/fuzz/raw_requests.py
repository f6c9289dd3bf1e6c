"""Requests as bytes: lines, headers, framing and bodies that no client library would send."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.support.mutating import damaged, json_bytes, mutated

DEEP = 100_000
_PATHS = (
    "/", "/v1", "/health", "/v1/models", "/v1/models/pico", "/v1/models/%ff%00", "/v1/models/..",
    "/v1/embeddings", "/api/tags", "/api/ps", "/api/version", "/api/nothing", "/openapi.json", "*",
    "http://localhost/v1/models", "/" + "a" * 9000, "/v1/%F0%9F%98%80", "//", "/v1/v1/v1/models",
    "/v1/models?a=%zz&a&&=", "/v1/chat/completions#x", "",
)  # fmt: skip
_METHODS = ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "get", "", "é")
_TYPES = (
    "text/plain", "application/json; charset=utf-16", "application/x-www-form-urlencoded",
    "multipart/form-data", "multipart/form-data; boundary=x", "", "application/json\x00", ";;;",
    "application/vnd.api+json",
)  # fmt: skip
_HEADERS = (
    b"Host: evil.example", b"Host: [", b"Host:", b"Origin: null", b"Origin: http://localhost:3000",
    b"Origin: http://[::1", b"Authorization: Bearer \xff\xfe", b"X-Api-Key: \xc3\xa9",
    b"Accept-Encoding: \x7f", b"Content-Encoding: gzip", b"Expect: 100-continue", b"Cookie: a=b; ;",
    b"Upgrade: websocket\r\nConnection: Upgrade", b"Range: bytes=0-", b"X: " + b"a" * 20_000,
    b"no colon", b" folded: x", b"A\x00B: c", b"Content-Length: 5", b"Content-Length: -1",
    b"Content-Length: 99999999999999999999", b"Content-Length: 1e3", b"Connection: keep-alive",
    b"Access-Control-Request-Headers: \xff", b"Transfer-Encoding: gzip, chunked",
    b"Forwarded: for=", b"X-Forwarded-Proto: https", b"Transfer-Encoding: identity",
)  # fmt: skip
_BAD_CHUNKS = (
    b"zz\r\n", b"-5\r\nhello\r\n", b"ffffffffffffffffff\r\n", b"5\r\nhel\r\n0\r\n\r\n",
    b"5;ext=" + b"x" * 9000 + b"\r\nhello\r\n", b"5\nhello\n0\n\n", b"0x5\r\nhello\r\n", b"\r\n",
    b"5\r\nhelloWORLD", b"0\r\nTrailer: x\r\n\r\n", b"7fffffff\r\n", b"\x00\r\n",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class RawRequest:
    """Bytes for one connection."""

    pieces: tuple[bytes, ...]
    """Sent one after the other."""
    is_whole: bool
    """Whether the server must answer; else the connection is closed in mid-request."""

    def __repr__(self) -> str:
        whole = b"".join(self.pieces)
        shown = whole if len(whole) < 3000 else whole[:2000] + b" ... " + whole[-500:]
        return f"RawRequest({shown!r}, {len(whole)} bytes, is_whole={self.is_whole})"


def raw_request(seed: dict[str, object], bodies: list[bytes], rng: random.Random) -> RawRequest:
    """A request near one of the corpus."""
    body = _body(seed["body"], bodies, rng)
    line, is_whole = _first_line(str(seed["path"]), rng)
    head = line + b"Host: localhost\r\nConnection: close\r\n"
    kind = "application/json" if rng.random() < 0.8 else rng.choice(_TYPES)
    head += f"Content-Type: {kind}\r\n".encode()
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        head += rng.choice(_HEADERS) + b"\r\n"
        is_whole = False  # a length or an encoding of its own may ask for more than comes
    framing = rng.random()
    if framing < 0.5:
        head, rest = head + f"Content-Length: {len(body)}\r\n\r\n".encode(), body
    elif framing < 0.6:
        n_more, is_whole = rng.choice([-3, -1, 1, 1000]), False
        head += f"Content-Length: {max(0, len(body) + n_more)}\r\n\r\n".encode()
        rest = body
    else:
        chunks, good = _chunked(body, rng)
        is_whole = is_whole and good
        head, rest = head + b"Transfer-Encoding: chunked\r\n\r\n", chunks
    if rng.random() < 0.1:
        head, is_whole = damaged(head, rng), False
    whole = head + rest
    if rng.random() < 0.1:
        whole, is_whole = whole[: rng.randrange(len(whole))], False
    return RawRequest(_pieces(whole, rng), is_whole)


def _first_line(path: str, rng: random.Random) -> tuple[bytes, bool]:
    """The first line, and whether it is one of HTTP; if not, the rest is not read."""
    if rng.random() < 0.8:
        return f"POST {path} HTTP/1.1\r\n".encode(), True
    method = "POST" if rng.random() < 0.5 else rng.choice(_METHODS)
    path = path if rng.random() < 0.5 else rng.choice(_PATHS)
    version = "HTTP/1.1" if rng.random() < 0.8 else rng.choice(["HTTP/1.0", "HTTP/2.0", "", "X"])
    return f"{method} {path} {version}\r\n".encode(), False


def _body(value: object, bodies: list[bytes], rng: random.Random) -> bytes:
    match rng.randrange(8):
        case 0:
            return _deep(rng)
        case 1:
            return damaged(rng.choice(bodies), rng, bodies)
        case 2:
            return rng.randbytes(rng.choice([0, 1, 20, 2000]))
        case 3:
            return json_bytes(value, rng).decode("utf-8", "replace").encode("utf-16")
        case _:
            return json_bytes(mutated(value, rng), rng)


def _deep(rng: random.Random) -> bytes:
    """Brackets in brackets, alone or where a value of a request stands."""
    n = rng.choice([50, 99, 101, 900, 5000, DEEP])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}"), (b"[{", b"")])
    nested = opening * n + b"1" + (closing * n if rng.random() < 0.7 else b"")
    field = rng.choice([
        b'"messages"', b'"tools"', b'"response_format"', b'"metadata"', b'"stop"', b'"prompt"',
        b'"system"', b'"options"', b'"extra_body"', b'"thinking"', b'"guided_json"',
    ])  # fmt: skip
    if rng.random() < 0.3:
        return nested
    if rng.random() < 0.3:
        return b'{"messages": [{"role": "user", "content": ' + nested + b"}]}"
    return b'{"messages": [{"role": "user", "content": "x"}], ' + field + b": " + nested + b"}"


def _chunked(body: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """A body in chunks, and whether they are right."""
    made, at = b"", 0
    while at < len(body):
        size = rng.choice([1, 7, 100, len(body)])
        part = body[at : at + size]
        made += f"{len(part):x}\r\n".encode() + part + b"\r\n"
        at += len(part)
        if len(made) > 20_000:  # enough small ones
            part = body[at:]
            made += f"{len(part):x}\r\n".encode() + part + b"\r\n" if part else b""
            break
    match rng.randrange(4):
        case 0:
            return made + rng.choice(_BAD_CHUNKS), False
        case 1:
            return made, False
        case _:
            return made + b"0\r\n\r\n", True


def _pieces(whole: bytes, rng: random.Random) -> tuple[bytes, ...]:
    if rng.random() < 0.8 or len(whole) < 2:
        return (whole,)
    cuts = sorted(rng.randrange(len(whole)) for _ in range(rng.choice([1, 3])))
    return tuple(whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True))
