"""A source model on the Hugging Face Hub, read by range: nothing but the output touches the disk.

The Hub says which files a revision has. Each read is one range of one file at the commit that was
found first; how it is asked for, and again after a failure, is `nanorun.net`'s business.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from nanorun.errors import (
    ModelError,
    SourceUnreachableError,
)
from nanorun.net.environment import hub_endpoint, without_password
from nanorun.net.ranges import N_CONNECTIONS, Http, Pause, Policy, RangeFile, forbidden
from nanorun_converters.source.files import Store, counts
from nanorun_converters.source.range_cache import RangeCache

if TYPE_CHECKING:
    import httpx
    from numpy.typing import NDArray

POLICY = Policy()
_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([^\s@]+))?")
_MOST_LISTING_BYTES = 2**26


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
        UsageError: If HF_ENDPOINT, a proxy or the token cannot be meant.
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
        self._http = Http(POLICY, pause, source=hub_endpoint())
        self.revision, self._entries = _list_files(
            self._http, repository, revision, str(self.where)
        )
        self._stores: dict[str, HubFile] = {}
        self._cache = RangeCache()

    def names(self) -> list[str]:
        """The names of all files, sorted."""
        return sorted(self._entries)

    def find(self, name: str) -> Store | None:
        """The file of this plain name, or None where there is none."""
        entry = self._entries.get(name)
        if entry is None:
            return None
        if name not in self._stores:
            base = f"{self._http.endpoint}/{self.repository}/resolve/{self.revision}"
            url, where = f"{base}/{quote(name)}", str(self.where / name)
            ranges = RangeFile(self._http, url, where, entry.n_bytes)
            self._stores[name] = HubFile(name, entry, ranges, self._cache)
        return self._stores[name]

    def modified(self, name: str) -> int | None:
        """None: when a file was written says nothing here."""
        return None

    def give_up(self) -> None:
        """End what is read just now, and read no more; any thread may call."""
        self._http.give_up()


@dataclass(frozen=True, slots=True)
class Entry:
    """What the Hub says of a file."""

    n_bytes: int
    sha256: str
    """Of the content, for files in LFS; else ""."""
    blob_id: str
    """git's hash of the content, for files that are not; else ""."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a revision."""

    name: str
    entry: Entry
    ranges: RangeFile
    cache: RangeCache

    @property
    def n_bytes(self) -> int:
        """Size of the whole."""
        return self.entry.n_bytes

    @property
    def sha256(self) -> str:
        """Hash of the content in hex, for files in LFS; else ""."""
        return self.entry.sha256

    @property
    def stamp(self) -> str:
        """Changes when the content does."""
        return self.entry.sha256 or self.entry.blob_id or self.ranges.url

    def read(self, offset: int, n_bytes: int) -> NDArray[np.uint8]:
        """Exactly `(n_bytes,)` from `offset`; a file read whole is checked by its hash."""
        if offset == 0 and n_bytes == self.n_bytes:
            data = self._fetch(0, n_bytes)
            self._check(data)
            return data
        return self.cache.read(self.ranges.url, offset, n_bytes, self.n_bytes, self._fetch)

    def _fetch(self, offset: int, n_bytes: int) -> NDArray[np.uint8]:
        return np.frombuffer(self.ranges.read(offset, n_bytes), np.uint8)

    def _check(self, data: NDArray[np.uint8]) -> None:
        if self.entry.sha256:
            expected, found = self.entry.sha256, hashlib.sha256(data.data).hexdigest()
        elif self.entry.blob_id:
            digest = hashlib.sha1(f"blob {data.nbytes}\0".encode(), usedforsecurity=False)
            digest.update(data.data)
            expected, found = self.entry.blob_id, digest.hexdigest()
        else:
            return
        if found != expected:
            raise SourceUnreachableError(
                f"{self.ranges.where}: expected content of hash {expected}, found {found}",
                facts=["what arrived is not what the Hub says it holds"],
            )


def _list_files(
    http: Http, repository: str, revision: str | None, where: str
) -> tuple[str, dict[str, Entry]]:
    """The commit that a revision stands for, and those of its files that count, by name.

    https://huggingface.co/docs/hub/api: `GET /api/models/{repo}/revision/{revision}?blobs=true`.
    """
    at = f"/revision/{quote(revision, safe='')}" if revision else ""
    url = f"{http.endpoint}/api/models/{repository}{at}?blobs=true"

    def ask() -> bytes:
        with http.answer(url) as (response, _):
            if response.status_code != 200:
                raise _refusal(http, response, where)
            body = bytearray()
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > _MOST_LISTING_BYTES:
                    raise ModelError(f"{where}: the Hub's list of its files has no end")
            return bytes(body)

    text = http.retried(where, ask)
    try:
        listing = json.loads(text)
        files = {file["rfilename"]: file for file in listing["siblings"]}
        entries = {name: _entry(file) for name, file in files.items() if counts(name)}
        return str(listing["sha"]), entries
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ModelError(f"{where}: the Hub's answer is no model", facts=[repr(error)]) from error


def _entry(listed: Mapping[str, Any]) -> Entry:
    lfs = listed.get("lfs") or {}
    n_bytes = lfs.get("size", listed.get("size"))
    if type(n_bytes) is not int or not 0 <= n_bytes < 2**48:
        raise ValueError(f"expected a size, found {n_bytes!r:.40}")
    sha256 = str(lfs.get("sha256") or "")
    return Entry(n_bytes, sha256, "" if sha256 else str(listed.get("blobId") or ""))


def _refusal(http: Http, response: httpx.Response, where: str) -> Exception:
    """The error for a repository that the Hub does not list."""
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    if code == "GatedRepo" or status == 403:
        return forbidden(where, is_hub=True)
    if code != "RevisionNotFound" and status not in (401, 404):
        return http.unreachable(where, f"HTTP status {status}")
    what = "revision" if code == "RevisionNotFound" else "model"
    shown = without_password(http.endpoint)
    return ModelError(
        f"{where}: the Hub at {shown} has no such {what}, or not for you",
        facts=["a private model needs a token: hf auth login, or HF_TOKEN"],
    )
