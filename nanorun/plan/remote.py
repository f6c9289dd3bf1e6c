"""Headers of GGUF files elsewhere: read by HTTP range, no more of a file than its directory.

A server is not trusted: what it says of sizes and ranges is checked against what it sends, the
header has the limit that `model/gguf.py` sets, redirects and waiting are bounded, and a token for
the Hub goes to the Hub only.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from nanorun.errors import LibraryError, ModelError, NanorunError
from nanorun.model.gguf import GgufFile, join_parts, read_stream

SUFFIX = ".gguf"
_HUB_SCHEME = "hf://"
_HUB_FILE = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+?)(?:@([^/\s]+))?/(.+\.gguf)", re.ASCII)
_HUB_PAGE = re.compile(r"(/[\w.-]+/[\w.-]+)/blob/(.+)", re.ASCII)
_FIRST_BYTES, _MOST_BYTES = 2**20, 2**24
_TIMEOUT_S, _DEADLINE_S = 10.0, 60.0
_N_TRIES, _PAUSE_S = 3, 0.3
_RETRIED = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """Where a GGUF file lies."""

    url: str
    shown: str
    """What messages call it: without scheme and query, which may hold a signature."""
    is_on_hub: bool = False
    """Whether the Hub's token belongs to requests for it."""

    def sibling(self, name: str) -> RemoteFile:
        """Another file of the same folder."""
        parts = urlsplit(self.url)
        folder = parts.path.rpartition("/")[0]
        url = urlunsplit(parts._replace(path=f"{folder}/{quote(name)}"))
        return replace(self, url=url, shown=f"{self.shown.rpartition('/')[0]}/{name}")


def parse_remote(text: str) -> RemoteFile | None:
    """The remote file that MODEL names, or None if it is of another form.

    Forms are `https://host/x.gguf`, `hf://owner/name/x.gguf`, and the same without `hf://`; a
    revision goes behind the name (`owner/name@v1/x.gguf`).
    """
    parts = urlsplit(text)
    if parts.scheme in ("http", "https") and parts.netloc:
        return _of_url(text)
    found = _HUB_FILE.fullmatch(text)
    if found is None or (not text.startswith(_HUB_SCHEME) and text.startswith((".", "/"))):
        return None
    repository, revision, path = found.groups()
    url = f"{_hub_endpoint()}/{repository}/resolve/{revision or 'main'}/{quote(path)}"
    return RemoteFile(url, text.removeprefix(_HUB_SCHEME), is_on_hub=True)


def _of_url(url: str) -> RemoteFile:
    parts = urlsplit(url)
    is_on_hub = parts.netloc == urlsplit(_hub_endpoint()).netloc
    page = _HUB_PAGE.fullmatch(parts.path)
    if is_on_hub and page is not None:
        # The address of the page that shows the file, as one copies it from a browser.
        parts = parts._replace(path=f"{page[1]}/resolve/{page[2]}")
    # A name and a password in an address stay out of messages.
    host = parts.netloc.rpartition("@")[2]
    return RemoteFile(urlunsplit(parts), f"{host}{unquote(parts.path)}", is_on_hub)


def _hub_endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def read_remote_gguf(remote: RemoteFile) -> GgufFile:
    """The header of a file, or of all files of one that is split.

    Raises:
        ModelError: If there is no such file, or it is no GGUF that could be used.
        NanorunError: If it cannot be reached.
    """
    first = _read(remote)
    return join_parts(first, lambda path: _read(remote.sibling(path.name)))


def _read(remote: RemoteFile) -> GgufFile:
    with ExitStack() as stack:
        stream = RangeStream(remote, stack)
        return read_stream(stream, Path(remote.shown), stream.open())


class RangeStream:
    """The bytes of a remote file in order, asked for in growing ranges.

    A server that does not know ranges sends the whole file; then its answer is read as far as it
    is needed, and hung up on.

    Args:
        remote: The file.
        stack: Ends what is still open.
    """

    def __init__(self, remote: RemoteFile, stack: ExitStack) -> None:
        self._remote, self._stack = remote, stack
        self._http = _Http()
        self._url, self._headers = remote.url, self._http.headers(remote)
        self._deadline = time.monotonic() + _DEADLINE_S
        self._buffer = bytearray()
        self._n_taken = 0
        self._n_next = _FIRST_BYTES
        self._file_bytes = 0
        self._etag: str | None = None
        self._body: Iterator[bytes] | None = None
        """What is left of an answer that holds the whole file."""

    def open(self) -> int:
        """Fetch the start.

        Returns:
            The size of the file.

        Raises:
            NanorunError: As `read_remote_gguf`.
        """
        self._fill(1)
        return self._file_bytes

    def read(self, n_bytes: int, /) -> bytes:
        """The next `n_bytes`, fewer at the end of the file."""
        if self._file_bytes:
            n_bytes = min(n_bytes, self._file_bytes - self._n_taken)
        self._fill(n_bytes)
        data = bytes(self._buffer[:n_bytes])
        del self._buffer[:n_bytes]
        self._n_taken += len(data)
        return data

    def _fill(self, n_bytes: int) -> None:
        """Have that many bytes in the buffer."""
        while len(self._buffer) < n_bytes:
            if self._body is None:
                self._fetch(max(n_bytes - len(self._buffer), self._n_next))
                self._n_next = min(2 * self._n_next, _MOST_BYTES)
            else:
                self._take(self._body, n_bytes - len(self._buffer))

    def _fetch(self, n_bytes: int) -> None:
        """One more range, at least the whole of it or an error."""
        problem = ""
        for i_try in range(_N_TRIES):
            if i_try:
                time.sleep(_PAUSE_S * i_try)
            first = self._n_taken + len(self._buffer)
            last = first + n_bytes - 1
            if self._file_bytes:
                last = min(last, self._file_bytes - 1)
            try:
                problem = self._ask(first, last)
            except self._http.errors as error:
                problem = f"{type(error).__name__}: {error}"
            if not problem:
                return
        raise self._unreachable(problem)

    def _ask(self, first: int, last: int) -> str:
        """Put a range into the buffer; a problem that another try may not meet, or ""."""
        with ExitStack() as stack:
            headers = {**self._headers, "Range": f"bytes={first}-{last}"}
            response = stack.enter_context(self._http.get(self._url, headers))
            status = response.status_code
            if status in _RETRIED:
                return f"HTTP status {status}"
            if status == 200 and first == 0:
                self._begin_whole(response)
                # It stays open beyond this call.
                self._stack.push(stack.pop_all())
                return ""
            if status != 206:
                raise self._refused(status, first)
            n_expected = self._check_range(response, first, last)
            n_before = len(self._buffer)
            self._follow(response)
            self._take(response.iter_raw(), n_expected)
        n_found = len(self._buffer) - n_before
        return "" if n_found == n_expected else f"{n_found} bytes came of {n_expected}"

    def _begin_whole(self, response: Any) -> None:
        length = response.headers.get("Content-Length", "")
        if not length.isdecimal() or not int(length):
            raise self._unreachable("the server knows no ranges and does not tell the size")
        self._file_bytes, self._body = int(length), response.iter_raw()

    def _check_range(self, response: Any, first: int, last: int) -> int:
        """The number of bytes that the answer must hold."""
        stated = response.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", stated, re.ASCII)
        start, end, total = (int(n) for n in found.groups()) if found else (-1, -1, -1)
        if start != first or not first <= end <= last or end >= total or total >= 2**63:
            raise ModelError(
                f"{self._remote.shown}: expected bytes {first} to {last}, found {stated!r:.60}"
            )
        etag = response.headers.get("ETag")
        if self._file_bytes and (total, etag) != (self._file_bytes, self._etag):
            raise ModelError(f"{self._remote.shown}: the file changed while it was read")
        self._file_bytes, self._etag = total, etag
        return end - first + 1

    def _follow(self, response: Any) -> None:
        """Ask next where a redirect led to, which saves the way; the token stays behind."""
        url = str(response.url)
        if urlsplit(url)[:2] != urlsplit(self._remote.url)[:2]:
            self._headers = self._http.plain_headers
        self._url = url

    def _take(self, chunks: Iterator[bytes], n_bytes: int) -> None:
        """Move bytes from an answer into the buffer, at least so many unless it ends before."""
        end = len(self._buffer) + n_bytes
        while len(self._buffer) < end:
            if time.monotonic() > self._deadline:
                raise self._unreachable(f"the header did not arrive in {_DEADLINE_S:.0f} s")
            chunk = next(chunks, None)
            if chunk is None:
                if self._body is not None:
                    raise self._unreachable("the answer ended before the file did")
                return
            # More than was asked for is not kept; an answer with the whole file goes on later.
            self._buffer += chunk if self._body is not None else chunk[: end - len(self._buffer)]

    def _refused(self, status: int, first: int) -> NanorunError:
        shown = self._remote.shown
        if status in (401, 403):
            tries = ["hf auth login"] if self._remote.is_on_hub else []
            facts = ["its licence may have to be accepted first"] if tries else []
            return ModelError(f"{shown}: the server does not let you read it", facts=facts,
                              tries=tries)  # fmt: skip
        if status in (404, 410):
            return ModelError(f"{shown}: there is no such file")
        if status == 416:
            return ModelError(f"{shown}: expected a GGUF file, found nothing from byte {first} on")
        return self._unreachable(f"HTTP status {status}")

    def _unreachable(self, reason: str) -> NanorunError:
        return NanorunError(f"{self._remote.shown} cannot be read", facts=[reason[:200]])


class _Http:
    """huggingface_hub's session, which knows proxies and certificates as people set them up."""

    def __init__(self) -> None:
        try:
            import huggingface_hub
            import huggingface_hub.utils
        except ImportError as error:
            raise LibraryError(
                "huggingface_hub is not installed", tries=["pip install huggingface_hub"]
            ) from error
        self._session: Any = huggingface_hub.get_session()
        self._utils: Any = huggingface_hub.utils
        package: Any = sys.modules[type(self._session).__module__.partition(".")[0]]
        self.errors: tuple[type[Exception], ...] = (OSError, package.HTTPError, package.InvalidURL)
        # What is compressed on the way could not be counted.
        self.plain_headers = {"Accept-Encoding": "identity", "User-Agent": "nanorun"}

    def headers(self, remote: RemoteFile) -> dict[str, str]:
        """With the token that a person has for the Hub, if it is the Hub that is asked."""
        if not remote.is_on_hub:
            return self.plain_headers
        token = os.environ.get("HF_TOKEN") or None
        ours = self._utils.build_hf_headers(token=token, library_name="nanorun")
        return {**ours, "Accept-Encoding": "identity"}

    def get(self, url: str, headers: dict[str, str]) -> Any:
        """A context manager of the answer, whose body is not read yet."""
        # A redirect to another host drops the token.
        return self._session.stream(
            "GET", url, headers=headers, timeout=_TIMEOUT_S, follow_redirects=True
        )
