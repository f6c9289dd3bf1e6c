"""Ranges of files elsewhere, read by HTTP; any number of threads may read at once.

A server is not trusted: what it says of sizes and ranges is checked against what was asked for,
redirects and waiting are bounded, and the Hub's token is shown to the Hub only. What arrived before
a connection broke is not asked for again.
"""

from __future__ import annotations

import atexit
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urljoin

from nanorun.errors import (
    LibraryError,
    ModelError,
    NanorunError,
    SourceLostError,
    SourceUnreachableError,
)
from nanorun.net import environment

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

N_CONNECTIONS = 16
"""At once, of one `Http`: more would not be faster, and are more than the Hub likes."""
_MOST_REDIRECTS = 5
_MOST_PASSED_OVER = 2**26
"""Bytes read for nothing from a server that knows no ranges."""
_RETRIED = (408, 425, 429, 500, 502, 503, 504)
# What a signed address answers when it has run out.
_STALE = (401, 403, 404, 410)
_TELL_S = 10.0
"""Between two messages about waiting."""

T = TypeVar("T")
Pause = Callable[[float], object]


@dataclass(frozen=True, slots=True)
class Policy:
    """How long to try."""

    n_tries: int = 8
    """Without anything arriving in between."""
    n_tries_unheard: int = 2
    """While the server has never answered: an address that is wrong stays wrong."""
    first_pause_s: float = 0.5
    longest_pause_s: float = 60.0
    longest_asked_pause_s: float = 300.0
    """That a server may ask for by Retry-After."""
    connect_timeout_s: float = 10.0
    timeout_s: float = 20.0
    """For the next bytes to come."""
    deadline_s: float = float("inf")
    """For everything that one `Http` is asked for."""


class Trouble(Exception):
    """A failure that another try may not meet."""

    def __init__(self, what: str, retry_after: str | None = None) -> None:
        super().__init__(what)
        self.retry_after = retry_after


class Http:
    """Connections, and the rules for using them.

    Args:
        policy: How long to try.
        pause: What waits between tries; None to wait until there is nothing to wait for.
        source: Where it is read from, in errors about files that are not called by their address.

    Raises:
        UsageError: If HF_ENDPOINT is no address.
    """

    def __init__(
        self, policy: Policy | None = None, pause: Pause | None = None, source: str = ""
    ) -> None:
        self._source = f" from {environment.without_password(source)}" if source else ""
        self.policy = policy or Policy()
        self.endpoint = environment.hub_endpoint()
        self._stopped = threading.Event()
        self._pause = pause or self._stopped.wait
        self._end_s = time.monotonic() + self.policy.deadline_s
        self._heard = False  # an answer of any kind
        self._told_s = float("-inf")
        timeout_s = self.policy.timeout_s
        self._timeout = (self.policy.connect_timeout_s, timeout_s, timeout_s, timeout_s)
        self._gate = threading.BoundedSemaphore(N_CONNECTIONS)

    def give_up(self) -> None:
        """End what is read just now, and read no more; any thread may call."""
        self._stopped.set()

    def is_hub(self, url: str) -> bool:
        """Whether the Hub's token may be shown to `url`."""
        return environment.is_at_hub(url, self.endpoint)

    def check(self, where: str) -> None:
        """Raise if there is no more reading.

        Raises:
            SourceUnreachableError: If it was given up or took too long.
        """
        if self._stopped.is_set():
            raise self.unreachable(where, "it was given up")
        if time.monotonic() > self._end_s:
            raise self.unreachable(where, f"it did not arrive in {self.policy.deadline_s:.0f} s")

    def retried(self, where: str, attempt: Callable[[], T], progress: Callable[[], int] = int) -> T:
        """What `attempt` returns, in as many tries as the policy has.

        Args:
            where: What is read, in errors.
            attempt: One try; raises `Trouble`, or what httpx raises.
            progress: Bytes so far; where they grow, the count of tries begins anew.

        Raises:
            SourceUnreachableError: If every try failed, or HF_HUB_OFFLINE is set.
            LibraryError: If the proxy is of a kind that needs another package.
        """
        import httpx

        if environment.is_offline():
            raise self.unreachable(where, "HF_HUB_OFFLINE is set")
        i_try = 0
        while True:
            self.check(where)
            n_before = progress()
            try:
                return attempt()
            except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
                raise self.unreachable(where, str(error)) from error
            except Trouble as error:
                trouble = error
            except (httpx.TransportError, OSError) as error:
                trouble = Trouble(f"{type(error).__name__}: {error}")
            i_try = 0 if progress() > n_before else i_try + 1
            policy = self.policy
            if i_try >= (policy.n_tries if self._heard else policy.n_tries_unheard):
                raise self.unreachable(where, str(trouble)) from trouble
            if i_try:
                self._wait(where, i_try - 1, trouble)

    @contextmanager
    def answer(
        self, url: str, headers: dict[str, str] | None = None
    ) -> Iterator[tuple[httpx.Response, str]]:
        """The answer to a GET, its body not read yet, and the address that gave it.

        Redirects are followed one by one: each address is shown the token only if it is the Hub's.
        """
        for _ in range(_MOST_REDIRECTS):
            # What is compressed on the way could not be counted.
            sent = {"User-Agent": "nanorun", "Accept-Encoding": "identity", **(headers or {})}
            if self.is_hub(url):
                sent = {**self._hub_headers, **sent}
            stream = _client().stream("GET", url, headers=sent, timeout=self._timeout)
            with self._gate, stream as response:
                self._heard = True
                target = response.headers.get("Location")
                if not 300 <= response.status_code < 400 or not target:
                    if response.status_code in _RETRIED:
                        status = f"HTTP status {response.status_code}"
                        raise Trouble(status, response.headers.get("Retry-After"))
                    yield response, url
                    return
            try:
                url = urljoin(url, target)
            except ValueError as error:
                raise Trouble("a redirect to an address that is none") from error
        raise Trouble("redirects without end")

    def unreachable(self, where: str, reason: str) -> SourceUnreachableError:
        """The error for something that does not arrive."""
        return SourceUnreachableError(f"{where} cannot be read{self._source}", facts=[reason[:200]])

    @cached_property
    def _hub_headers(self) -> dict[str, str]:
        return environment.hub_headers()

    def _wait(self, where: str, i_try: int, trouble: Trouble) -> None:
        policy = self.policy
        pause_s = min(policy.longest_pause_s, policy.first_pause_s * 2**i_try)
        pause_s *= random.uniform(0.75, 1.25)
        if trouble.retry_after is not None and trouble.retry_after.isdecimal():
            pause_s = max(pause_s, min(float(trouble.retry_after), policy.longest_asked_pause_s))
        pause_s = min(pause_s, max(self._end_s - time.monotonic(), 0.0))
        now = time.monotonic()
        if pause_s >= 1 and now - self._told_s > _TELL_S:
            self._told_s = now
            log.warning("%s: %s; trying again in %.0f s", where, trouble, pause_s)
        self._pause(pause_s)


@cache
def _client() -> httpx.Client:
    """The process's connections, which go through the proxies that `proxy_for` names."""
    import httpx

    class Proxied(httpx.BaseTransport):
        def __init__(self) -> None:
            self._through: dict[str | None, httpx.HTTPTransport] = {}

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            proxy = environment.proxy_for(str(request.url))
            if proxy not in self._through:
                self._through.setdefault(proxy, _transport(proxy))
            try:
                return self._through[proxy].handle_request(request)
            except httpx.ConnectError as error:
                if proxy is None:
                    raise
                shown = environment.without_password(proxy)
                raise httpx.ConnectError(f"{error} by the proxy {shown}") from error

        def close(self) -> None:
            for transport in self._through.values():
                transport.close()

    client = httpx.Client(transport=Proxied())
    atexit.register(client.close)
    return client


def _transport(proxy: str | None) -> httpx.HTTPTransport:
    import httpx

    try:
        return httpx.HTTPTransport(proxy=proxy)
    except ImportError as error:
        shown = environment.without_password(proxy or "")
        what = f"the proxy {shown} needs a package that is not installed"
        raise LibraryError(what, tries=["pip install 'httpx[socks]'"]) from error


class RangeFile:
    """One file elsewhere.

    Args:
        http: Connections.
        url: Where it lies.
        where: What errors call it.
        n_bytes: Its size where that is known; None to believe what the server says first.
    """

    def __init__(self, http: Http, url: str, where: str, n_bytes: int | None = None) -> None:
        self.http, self.url, self.where, self.n_bytes = http, url, where, n_bytes
        self._is_pinned = n_bytes is not None
        self._etag: str | None = None
        self._location: str | None = None
        """Where redirects led to, which saves the way until that address runs out."""

    def read(self, offset: int, n_bytes: int) -> bytearray:
        """`n_bytes` from `offset`, fewer at the end of the file; any thread may call.

        Raises:
            SourceLostError: If the file is gone, is another by now, or may not be read.
            SourceUnreachableError: If it did not arrive after many tries, or reading was given up.
        """
        data = bytearray()
        if self._n_there(offset, n_bytes):
            self.http.retried(
                self.where, lambda: self._fetch(offset, n_bytes, data), lambda: len(data)
            )
        return data

    def _n_there(self, offset: int, n_bytes: int) -> int:
        return n_bytes if self.n_bytes is None else max(0, min(n_bytes, self.n_bytes - offset))

    def _fetch(self, offset: int, n_bytes: int, data: bytearray) -> None:
        """Ask for what of the range is missing in `data`, and append what comes."""
        first = offset + len(data)
        last = offset + self._n_there(offset, n_bytes) - 1
        headers = {"Range": f"bytes={first}-{last}"}
        try:
            with self.http.answer(self._location or self.url, headers) as (response, url):
                n_passed_over = self._check(response, url, first, last)
                self._location = url
                self._take(response, n_passed_over, self._n_there(offset, n_bytes), data)
        except Trouble:
            self._location = None
            raise

    def _take(
        self, response: httpx.Response, n_passed_over: int, n_wanted: int, data: bytearray
    ) -> None:
        """Append what an answer holds after `n_passed_over` bytes, until `data` is `n_wanted`."""
        for chunk in response.iter_raw():
            self.http.check(self.where)
            data += chunk[n_passed_over : n_passed_over + n_wanted - len(data)]
            n_passed_over = max(0, n_passed_over - len(chunk))
            if len(data) == n_wanted:
                return
        raise Trouble(f"the answer ended at {len(data)} of {n_wanted} bytes")

    def _check(self, response: httpx.Response, url: str, first: int, last: int) -> int:
        """Check that an answer holds the range; how many bytes come before the range.

        Those are the beginning of the file, from a server that knows no ranges.
        """
        status = response.status_code
        if status == 206:
            self._check_range(response, first, last)
            return 0
        if status == 200:
            length = response.headers.get("Content-Length", "")
            n_bytes = int(length) if length.isdecimal() else self.n_bytes
            if not n_bytes or first > _MOST_PASSED_OVER:
                reason = "the server knows no ranges" + ("" if n_bytes else " and tells no size")
                raise self.http.unreachable(self.where, reason)
            self._check_same(n_bytes, response)
            return first
        if status in _STALE and not self.http.is_hub(url) and url != self.url:
            raise Trouble(f"HTTP status {status} from where the server sent on to")
        raise self._refusal(status, first)

    def _check_range(self, response: httpx.Response, first: int, last: int) -> None:
        stated = response.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", stated, re.ASCII)
        start, end, total = found.groups() if found else ("-1", "-1", "*")
        n_bytes = self.n_bytes if total == "*" else int(total)
        is_asked = int(start) == first <= int(end) <= last
        if not is_asked or n_bytes is None or int(end) >= n_bytes:
            raise SourceLostError(
                f"{self.where}: expected bytes {first} to {last}, found {stated!r:.60}"
            )
        self._check_same(n_bytes, response)

    def _check_same(self, n_bytes: int, response: httpx.Response) -> None:
        """Check that the file is still the one that was read from before."""
        etag = None if self._is_pinned else response.headers.get("ETag")
        if self.n_bytes is None:
            self.n_bytes, self._etag = n_bytes, etag
        elif (n_bytes, etag) != (self.n_bytes, self._etag):
            raise SourceLostError(
                f"{self.where}: the file changed while it was read",
                facts=[f"expected {self.n_bytes} bytes, found {n_bytes}"],
            )

    def _refusal(self, status: int, first: int) -> NanorunError:
        if status in (401, 403):
            return forbidden(self.where, is_hub=self.http.is_hub(self.url))
        if status in (404, 410):
            any_more = " any more" if self._is_pinned else ""
            return SourceLostError(f"{self.where}: there is no such file{any_more}")
        if status == 416:
            return ModelError(f"{self.where}: found nothing from byte {first} on")
        return self.http.unreachable(self.where, f"HTTP status {status}")


def forbidden(where: str, *, is_hub: bool) -> SourceLostError:
    """The error for something that this person may not read."""
    if not is_hub:
        return SourceLostError(f"{where}: the server does not let you read it")
    return SourceLostError(
        f"{where}: the Hub does not let you read it",
        facts=["its licence may have to be accepted on its page first"],
        tries=["hf auth login"],
    )
