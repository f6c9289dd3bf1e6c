"""A source model on the Hugging Face Hub, read by range: nothing but the output touches the disk.

huggingface_hub says which files a revision has, and lends its HTTP client, its token and its
endpoint. Each read is one range of one file at the commit that was found first, tried again with a
growing pause until the Hub has answered or been given up.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urljoin, urlsplit

import numpy as np

from nanorun.errors import LibraryError, ModelError, NanorunError, UsageError
from nanorun_converters.source.files import SourceLostError, SourceUnreachableError, Store
from nanorun_converters.source.range_cache import RangeCache

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEFAULT_ENDPOINT = "https://huggingface.co"
N_TRIES = 8
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
TIMEOUT_S = 20.0
"""Of one step: to connect, or for the next bytes to come."""
_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([^\s@]+))?")
_RETRIED = (408, 425, 429, 500, 502, 503, 504)
# What a signed address answers when it has run out.
_STALE = (401, 403, 404, 410)
# More at once would not be faster, and more than a Hub's client may ask for.
N_CONNECTIONS = 16

Pause = Callable[[float], object]


def parse_repository(text: str) -> tuple[str, str | None] | None:
    """Repository and revision, if `text` is of the form `owner/name[@revision]`."""
    found = _REPOSITORY.fullmatch(text)
    return None if found is None else (found[1], found[2])


class HubFiles:
    """The files of one revision of a repository.

    Args:
        repository: `owner/name`.
        revision: Branch, tag or commit; None for the default branch.
        pause: What waits between tries; None to wait until there is nothing to wait for.

    Raises:
        UsageError: If HF_ENDPOINT or the token cannot be meant.
        ModelError: If there is no such repository or revision, or it may not be read.
        SourceUnreachableError: If the Hub does not answer.
    """

    def __init__(
        self, repository: str, revision: str | None = None, pause: Pause | None = None
    ) -> None:
        self.repository = repository
        self.n_reads_ahead = N_CONNECTIONS
        self.argument = f"{repository}@{revision}" if revision else repository
        self.where = PurePosixPath(self.argument)
        self._client = HubClient(pause)
        info = self._client.model_info(repository, revision, str(self.where))
        self.revision: str = info.sha
        self._files = {s.rfilename: s for s in info.siblings or [] if "/" not in s.rfilename}
        self._stores: dict[str, HubFile] = {}
        self._cache = RangeCache()

    def names(self) -> list[str]:
        """The names of all files, sorted."""
        return sorted(self._files)

    def find(self, name: str) -> Store | None:
        """The file of this plain name, or None where there is none."""
        sibling = self._files.get(name)
        if sibling is None:
            return None
        if name not in self._stores:
            path = f"{self.repository}/resolve/{self.revision}/{quote(name)}"
            lfs = sibling.lfs
            self._stores[name] = HubFile(
                name=name,
                where=str(self.where / name),
                n_bytes=_size_of(sibling, str(self.where / name)),
                sha256=lfs.sha256 if lfs else "",
                blob_id="" if lfs else sibling.blob_id or "",
                path=path,
                client=self._client,
                cache=self._cache,
            )
        return self._stores[name]

    def give_up(self) -> None:
        """End what is read just now, and read no more; any thread may call."""
        self._client.stopped.set()


def _size_of(sibling: Any, where: str) -> int:
    size = sibling.lfs.size if sibling.lfs else sibling.size
    if type(size) is not int or not 0 <= size < 2**48:
        raise ModelError(f"{where}: expected a size from the Hub, found {size!r:.40}")
    return size


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a revision."""

    name: str
    where: str
    n_bytes: int
    sha256: str
    """Of the content, for files in LFS; else ""."""
    blob_id: str
    """git's hash of the content, for files that are not."""
    path: str
    """Below the endpoint."""
    client: HubClient
    cache: RangeCache

    @property
    def stamp(self) -> str:
        """Changes when the content does."""
        return self.sha256 or self.blob_id or self.path

    def read(self, offset: int, n_bytes: int) -> NDArray[np.uint8]:
        """Exactly `n_bytes` bytes from `offset`; a file read whole is checked by its hash."""
        if offset == 0 and n_bytes == self.n_bytes:
            data = self._fetch(0, n_bytes)
            self._check(data)
            return data
        return self.cache.read(self.path, offset, n_bytes, self.n_bytes, self._fetch)

    def _fetch(self, offset: int, n_bytes: int) -> NDArray[np.uint8]:
        return self.client.fetch(self.path, self.where, offset, n_bytes, self.n_bytes)

    def _check(self, data: NDArray[np.uint8]) -> None:
        if self.sha256:
            expected, found = self.sha256, hashlib.sha256(data.data).hexdigest()
        elif self.blob_id:
            header = f"blob {data.nbytes}\0".encode()
            digest = hashlib.sha1(header + data.tobytes(), usedforsecurity=False)
            expected, found = self.blob_id, digest.hexdigest()
        else:
            return
        if found != expected:
            raise SourceUnreachableError(
                f"{self.where}: expected content of hash {expected}, found {found}",
                facts=["what arrived is not what the Hub says it holds"],
            )


class HubClient:
    """Asks the Hub, again and again where that can help."""

    def __init__(self, pause: Pause | None = None) -> None:
        try:
            import huggingface_hub
            import huggingface_hub.errors
            import huggingface_hub.utils
        except ImportError as error:
            raise LibraryError(
                "huggingface_hub is not installed", tries=["pip install huggingface_hub"]
            ) from error
        self._hub = huggingface_hub
        # Read now, not when huggingface_hub was first imported.
        self.endpoint = _endpoint()
        self.stopped = threading.Event()
        self._pause = pause or self.stopped.wait
        self._session = huggingface_hub.get_session()
        package = sys.modules[type(self._session).__module__.partition(".")[0]]
        self._transport_errors: tuple[type[Exception], ...] = (
            OSError, package.HTTPError, package.InvalidURL,
        )  # fmt: skip
        utils: Any = huggingface_hub.utils
        headers = utils.build_hf_headers(library_name="nanorun")
        if not all(value.isascii() and value.isprintable() for value in headers.values()):
            # Here, because HTTP's own complaint would show it.
            raise UsageError("HF_TOKEN, or the token of hf auth login, has characters no token has")
        self._headers: Mapping[str, str] = {**headers, "Accept-Encoding": "identity"}
        self._locations: dict[str, str] = {}
        self._gate = threading.BoundedSemaphore(N_CONNECTIONS)

    def model_info(self, repository: str, revision: str | None, where: str) -> Any:
        """What the Hub knows about a revision, its files and their sizes."""
        api = self._hub.HfApi(endpoint=self.endpoint)
        errors = self._hub.errors
        for i_try in range(N_TRIES):
            try:
                return api.model_info(
                    repository, revision=revision, files_metadata=True, timeout=TIMEOUT_S
                )
            except errors.GatedRepoError as error:
                raise _forbidden(where) from error
            except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
                what = "revision" if isinstance(error, errors.RevisionNotFoundError) else "model"
                raise ModelError(
                    f"{where}: the Hub at {_shown(self.endpoint)} has no such {what}, or not for"
                    " you",
                    facts=["a private model needs a token: hf auth login, or HF_TOKEN"],
                ) from error
            except errors.OfflineModeIsEnabled as error:
                raise self._unreachable(where, "HF_HUB_OFFLINE is set") from error
            except errors.HfHubHTTPError as error:
                response = getattr(error, "response", None)
                if response is None or response.status_code not in _RETRIED:
                    raise self._unreachable(where, str(error).partition("\n")[0]) from error
                self._wait(i_try, response.headers.get("Retry-After"))
                reason: Exception = error
            except self._transport_errors as error:
                self._wait(i_try, None)
                reason = error
            except (TypeError, KeyError, AttributeError, ValueError) as error:
                what = f"{where}: the Hub's answer is no model"
                raise ModelError(what, facts=[str(error)]) from error
        raise self._unreachable(where, str(reason)) from reason

    def fetch(
        self, path: str, where: str, offset: int, n_bytes: int, n_file_bytes: int
    ) -> NDArray[np.uint8]:
        """A range of a file; what arrived before a connection broke is not asked for again.

        Raises:
            SourceLostError: If the file is gone, or may not be read.
            SourceUnreachableError: If it did not arrive after many tries.
        """
        buffer = np.empty(n_bytes, np.uint8)
        n_done, i_try, problem = 0, 0, ""
        while n_done < n_bytes:
            if self.stopped.is_set():
                raise self._unreachable(where, "it was given up")
            if i_try == N_TRIES:
                kept = "what was converted so far is kept: the same command goes on"
                raise self._unreachable(where, problem, kept)
            before = n_done
            try:
                with self._gate, self._answer(path, where, offset + n_done, offset + n_bytes) as r:
                    problem = self._problem(r, path, where, offset + n_done, n_file_bytes)
                    retry_after = r.headers.get("Retry-After")
                    if not problem:
                        n_done = _receive(r, buffer, n_done)
                        problem = "the answer was shorter than asked for"
            except self._transport_errors as error:
                problem, retry_after = f"{type(error).__name__}: {error}", None
                n_done = getattr(error, "n_received", n_done)
            # A connection that brings something is worth as many tries again.
            i_try = 0 if n_done > before else i_try + 1
            if n_done < n_bytes and i_try:
                self._wait(i_try - 1, retry_after)
        return buffer

    @contextmanager
    def _answer(self, path: str, where: str, first: int, end: int) -> Iterator[Any]:
        url = self._locations.get(path) or self._locate(path)
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={first}-{end - 1}"}
        if self._is_hub(url):
            headers = {**self._headers, **headers}
        with self._session.stream("GET", url, headers=headers, timeout=TIMEOUT_S) as response:
            yield response

    def _locate(self, path: str) -> str:
        """Where a file really lies: the Hub sends to a storage, by an address that runs out."""
        url = f"{self.endpoint}/{path}"
        for _ in range(3):
            response = self._session.head(
                url, headers=dict(self._headers), follow_redirects=False, timeout=TIMEOUT_S
            )
            target = response.headers.get("Location")
            if not 300 <= response.status_code < 400 or not target:
                break
            try:
                url = urljoin(url, target)
            except ValueError:
                break  # an address that is none: the same answer to GET is tried again
            if not self._is_hub(url):
                break
        self._locations[path] = url
        return url

    def _is_hub(self, url: str) -> bool:
        """Whether an address is the Hub's own, which alone is shown the token."""
        asked, own = urlsplit(url), urlsplit(self.endpoint)
        return asked.netloc == own.netloc and asked.scheme in (own.scheme, "https")

    def _problem(self, response: Any, path: str, where: str, first: int, n_file_bytes: int) -> str:
        """Why an answer is not the range that was asked for; "" where it is."""
        status = response.status_code
        if status in _STALE:
            self._locations.pop(path, None)
            if not self._is_hub(str(response.url)):
                return f"HTTP status {status} from the storage"
            if status in (401, 403):
                raise _forbidden(where)
            raise SourceLostError(f"{where}: the Hub has no such file any more")
        if status in _RETRIED:
            self._locations.pop(path, None)
            return f"HTTP status {status}"
        if status == 200 and first == 0:
            n_bytes = response.headers.get("Content-Length", str(n_file_bytes))
            return "" if n_bytes == str(n_file_bytes) else f"an answer of {n_bytes:.20} bytes"
        if status != 206:
            raise self._unreachable(where, f"HTTP status {status} where 206 was expected")
        stated = response.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", stated)
        if found is None or int(found[1]) != first or found[2] not in (str(n_file_bytes), "*"):
            raise SourceLostError(
                f"{where}: expected bytes from {first} of {n_file_bytes}, found {stated!r:.60}"
            )
        return ""

    def _wait(self, i_try: int, retry_after: str | None) -> None:
        if i_try == N_TRIES - 1:
            return  # nothing follows that would be worth waiting for
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**i_try) * random.uniform(0.75, 1.25)
        if retry_after is not None and retry_after.isdecimal():
            pause = max(pause, min(float(retry_after), 5 * LONGEST_PAUSE_S))
        self._pause(pause)

    def _unreachable(self, where: str, reason: str, *facts: str) -> NanorunError:
        return SourceUnreachableError(
            f"{where} cannot be read from {_shown(self.endpoint)}",
            facts=[reason[:200], *facts],
        )


def _receive(response: Any, buffer: NDArray[np.uint8], n_done: int) -> int:
    """Put what arrives behind the first `n_done` bytes; how many there are then.

    An error on the way carries that number as `n_received`.
    """
    try:
        for chunk in response.iter_raw():
            n = min(len(chunk), buffer.nbytes - n_done)
            buffer[n_done : n_done + n] = np.frombuffer(chunk, np.uint8, n)
            n_done += n
            if n_done == buffer.nbytes:
                break
    except Exception as error:
        error.n_received = n_done  # type: ignore[attr-defined]
        raise
    return n_done


def _endpoint() -> str:
    endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    if not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", endpoint):
        raise UsageError(
            f"HF_ENDPOINT is no address: {_shown(endpoint)!r}",
            facts=[f"it starts with https://, as {DEFAULT_ENDPOINT} does"],
        )
    return endpoint


def _shown(endpoint: str) -> str:
    """An address without the name and the password that it may hold."""
    return re.sub(r"//[^/@]*@", "//", endpoint)


def _forbidden(where: str) -> SourceLostError:
    return SourceLostError(
        f"{where}: the Hub does not let you read it",
        facts=["its licence may have to be accepted on its page first"],
        tries=["hf auth login"],
    )
