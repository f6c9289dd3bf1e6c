"""Headers of GGUF files elsewhere: read by HTTP range, no more of a file than its directory.

A header has the limit that `model/gguf.py` sets; what else a server may do is checked by
`nanorun.net`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from nanorun.errors import UsageError
from nanorun.model.gguf import GgufFile, join_parts, read_stream
from nanorun.net.environment import hub_endpoint
from nanorun.net.ranges import Http, Policy, RangeFile

SUFFIX = ".gguf"
_HUB_SCHEME = "hf://"
_HUB_FILE = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+?)(?:@([^/\s]+))?/(.+\.gguf)", re.ASCII)
_HUB_PAGE = re.compile(r"(/[\w.-]+/[\w.-]+)/blob/(.+)", re.ASCII)
_FIRST_BYTES, _MOST_BYTES = 2**20, 2**24
POLICY = Policy(
    n_tries=3, first_pause_s=0.3, longest_asked_pause_s=10.0, timeout_s=10.0, deadline_s=60.0
)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """Where a GGUF file lies."""

    url: str
    shown: str
    """What messages call it: without scheme and query, which may hold a signature."""

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

    Raises:
        UsageError: If it begins like an address but is none, or HF_ENDPOINT is none.
    """
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises what `urlsplit` lets pass
    except ValueError as error:
        raise UsageError(f"{text:.200} is no address: {error}") from error
    if parts.scheme in ("http", "https") and parts.netloc:
        return _of_url(text)
    found = _HUB_FILE.fullmatch(text)
    if found is None or (not text.startswith(_HUB_SCHEME) and text.startswith((".", "/"))):
        return None
    repository, revision, path = found.groups()
    url = f"{hub_endpoint()}/{repository}/resolve/{revision or 'main'}/{quote(path)}"
    return RemoteFile(url, text.removeprefix(_HUB_SCHEME))


def _of_url(url: str) -> RemoteFile:
    parts = urlsplit(url)
    page = _HUB_PAGE.fullmatch(parts.path)
    if page is not None and parts.netloc == urlsplit(hub_endpoint()).netloc:
        # The address of the page that shows the file, as one copies it from a browser.
        parts = parts._replace(path=f"{page[1]}/resolve/{page[2]}")
    # A name and a password in an address stay out of messages.
    host = parts.netloc.rpartition("@")[2]
    return RemoteFile(urlunsplit(parts), f"{host}{unquote(parts.path)}")


def read_remote_gguf(remote: RemoteFile) -> GgufFile:
    """The header of a file, or of all files of one that is split.

    Raises:
        ModelError: If there is no such file, or it is no GGUF that could be used.
        NanorunError: If it cannot be reached.
    """
    first = _read(remote)
    return join_parts(first, lambda path: _read(remote.sibling(path.name)))


def _read(remote: RemoteFile) -> GgufFile:
    stream = _HeaderStream(RangeFile(Http(POLICY), remote.url, remote.shown))
    return read_stream(stream, Path(remote.shown), stream.open())


class _HeaderStream:
    """The bytes of a file in order, asked for in growing ranges."""

    def __init__(self, file: RangeFile) -> None:
        self._file = file
        self._buffer = bytearray()
        self._n_taken = 0
        self._n_next = _FIRST_BYTES

    def open(self) -> int:
        """Fetch the start; returns the size of the file."""
        self._fill(1)
        return self._file.n_bytes or 0

    def read(self, n_bytes: int, /) -> bytes:
        """The next `n_bytes`, fewer at the end of the file."""
        self._fill(n_bytes)
        data = bytes(self._buffer[:n_bytes])
        del self._buffer[:n_bytes]
        self._n_taken += len(data)
        return data

    def _fill(self, n_bytes: int) -> None:
        """Have `n_bytes` in the buffer, or all that is left of the file."""
        n_missing = n_bytes - len(self._buffer)
        if n_missing > 0:
            offset = self._n_taken + len(self._buffer)
            self._buffer += self._file.read(offset, max(n_missing, self._n_next))
            self._n_next = min(2 * self._n_next, _MOST_BYTES)
