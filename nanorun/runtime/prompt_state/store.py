"""Prompt states on disk: the file format, and a folder of such files.

A file holds one sequence: its tokens, its KV and recurrent state, and the recurrent states saved
along it. It is written to a temporary name and renamed, every section carries a checksum, and the
header names the model it belongs to, so that a torn, damaged or foreign file is never loaded.

    magic 8 | header length u32 | header JSON | header digest 16 | tokens | full state | checkpoints
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import numpy as np
import psutil
from numpy.typing import NDArray

from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.prompt_state.archived_state import ArchivedState, StatePayload
from nanorun.runtime.prompt_state.place_index import PlaceIndex
from nanorun.runtime.prompt_state.prefixes import Tokens

log = logging.getLogger(__name__)

MAGIC = b"NRSTATE\x01"
SUFFIX = ".nrstate"
PREFIX_SUFFIX = ".prefix" + SUFFIX
# Of the budget, the part in which prefixes are kept before all conversations. A client whose system
# prompt is another each time must not push out all else.
PREFIX_SHARE = 0.5
_DIGEST_BYTES = 16
_MAX_HEADER_BYTES = 2**20


_File = tuple[Path, os.stat_result]


class BadStateFile(Exception):
    """A state file that is torn, damaged, foreign or of another version."""


@dataclass(frozen=True, slots=True)
class StateHeader:
    """What a file says about itself; enough to decide whether a prompt can use it."""

    fingerprint: str
    tokens: NDArray[np.int32]
    checkpoint_positions: tuple[int, ...]


def open_store(model: LoadedModel, options: EngineOptions) -> StateStore | None:
    """The store that an engine's options ask for, if any."""
    if options.state_dir is None:
        return None
    types = f"{options.type_k.label}/{options.type_v.label}"
    if options.speculation == "mtp":
        types += "/mtp"  # the head's state is part of it
    identity = f"{model.fingerprint}/{types}/{version('llama-cpp-python')}"
    fingerprint = hashlib.blake2b(identity.encode(), digest_size=_DIGEST_BYTES).hexdigest()
    return StateStore(Path(options.state_dir), fingerprint, options.state_bytes)


class StateStore:
    """A folder of state files of one model.

    Args:
        folder: Where they are; made when the first is written.
        fingerprint: What they must belong to: model file, cache types, engine.
        budget_bytes: Disk they may take; the least recently used go first, those of prefixes last.
        max_age_s: Files unused for longer are removed.
    """

    def __init__(
        self, folder: Path, fingerprint: str, budget_bytes: int, max_age_s: float = 30 * 86400
    ) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        self._budget = budget_bytes
        self._max_age_s = max_age_s
        self.index = PlaceIndex()
        """The sequences it holds for this model."""
        self._by_path: dict[Path, ArchivedState] = {}
        self._lock = threading.Lock()
        for path in folder.glob("*.part"):
            if not _is_being_written(path):
                _remove(path)
        for path in sorted(folder.glob("*" + SUFFIX)):
            self._adopt(path)
        self._prune()

    def _adopt(self, path: Path) -> None:
        """List a file found in the folder; one of another model stays, a damaged one goes."""
        try:
            header = read_header(path)
        except BadStateFile as error:
            log.warning("removed the damaged state file %s: %s", path.name, error)
            _remove(path)
            return
        except OSError as error:  # it may be whole, and readable another time
            log.warning("the state file %s cannot be read: %s", path.name, error)
            return
        if header.fingerprint == self._fingerprint:
            positions = frozenset(header.checkpoint_positions)
            entry = ArchivedState(header.tokens, "disk", positions, path, _is_prefix(path))
            self._list(entry, path)

    def save(self, state: ArchivedState, payload: StatePayload) -> ArchivedState | None:
        """Write a sequence; files of its own prefixes that it makes useless are removed.

        Returns:
            The entry, or None where the disk refused (logged, never raised: a reply matters more).
        """
        if payload.n_bytes > self._budget:  # it would push out all others, then itself
            log.warning("a prompt state of %d bytes is larger than its budget", payload.n_bytes)
            return None
        path = self._path(state.tokens, is_prefix=state.is_prefix)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_state(path, self._fingerprint, state.tokens, payload)
        except OSError as error:
            log.warning("a prompt state of %d bytes was not saved: %s", payload.n_bytes, error)
            return None
        positions = frozenset(payload.checkpoints)
        entry = ArchivedState(state.tokens, "disk", positions, path, state.is_prefix)
        for old in self.index.covered_by(entry):
            if old.path != path:
                self.forget(old)
        self._list(entry, path)
        self._prune(newest=path)
        return entry

    def _path(self, tokens: Tokens, *, is_prefix: bool) -> Path:
        name = hashlib.blake2b(
            self._fingerprint.encode() + tokens.tobytes(), digest_size=_DIGEST_BYTES
        ).hexdigest()
        return self._folder / (name + (PREFIX_SUFFIX if is_prefix else SUFFIX))

    def touch_prefix(self, tokens: Tokens) -> None:
        """Note that a prefix was used, if it is held."""
        with contextlib.suppress(OSError):
            os.utime(self._path(tokens, is_prefix=True))

    def load(self, entry: ArchivedState) -> StatePayload | None:
        """The states of an entry; None if they are damaged (the file is removed) or gone."""
        assert entry.path is not None
        try:
            header, payload = read_state(entry.path)
        except BadStateFile as error:
            log.warning("removed the damaged state file %s: %s", entry.path.name, error)
            self.forget(entry)
            return None
        except OSError as error:  # most likely another process has removed it
            log.warning("the state file %s cannot be read: %s", entry.path.name, error)
            self._unlist(entry.path)
            return None
        if header.fingerprint != self._fingerprint or not _has_all(header, entry):
            self._unlist(entry.path)  # another process has written another state of this name
            return None
        with contextlib.suppress(OSError):
            os.utime(entry.path)
        return payload

    def forget(self, entry: ArchivedState) -> None:
        """Remove a file."""
        if entry.path is not None:
            self._unlist(entry.path)
            _remove(entry.path)

    def _list(self, entry: ArchivedState, path: Path) -> None:
        with self._lock:
            old = self._by_path.get(path)
            if old is not None:
                self.index.discard(old)
            self._by_path[path] = entry
            self.index.add(entry)

    def _unlist(self, path: Path) -> None:
        with self._lock:
            entry = self._by_path.pop(path, None)
            if entry is not None:
                self.index.discard(entry)

    def _prune(self, newest: Path | None = None) -> None:
        """Remove what is too old, then the least recently used until the budget holds.

        Prefixes go after all conversations, but before these what is more than their share.

        The folder is shared by all models, so files of others count and may go too.

        Args:
            newest: The file just written; it stays, even if a clock that ran ahead has left others
                that look newer.
        """
        files = [
            (path, stat)
            for path in self._folder.glob("*" + SUFFIX)
            if (stat := _stat(path)) is not None
        ]
        n_bytes = sum(stat.st_size for _, stat in files)
        oldest_allowed = time.time() - self._max_age_s
        for path, stat in _least_worth_first(files, int(PREFIX_SHARE * self._budget)):
            if path == newest or (n_bytes <= self._budget and stat.st_mtime >= oldest_allowed):
                continue
            n_bytes -= stat.st_size
            self._unlist(path)
            _remove(path)


def _is_prefix(path: Path) -> bool:
    return path.name.endswith(PREFIX_SUFFIX)


def _least_worth_first(files: Iterable[_File], n_prefix_bytes: int) -> list[_File]:
    """Files in the order in which they go: prefixes beyond their share, conversations, prefixes.

    Among each the least recently used go first.

    Args:
        files: All of a folder.
        n_prefix_bytes: The share of prefixes.
    """
    worth = {}
    for path, stat in sorted(files, key=lambda file: file[1].st_mtime, reverse=True):
        n_prefix_bytes -= stat.st_size if _is_prefix(path) else 0
        kind = 1 if not _is_prefix(path) else 2 if n_prefix_bytes >= 0 else 0
        worth[path] = (kind, stat.st_mtime)
    return sorted(files, key=lambda file: worth[file[0]])


def _has_all(header: StateHeader, entry: ArchivedState) -> bool:
    """Whether a file still holds what it was listed with."""
    positions = entry.checkpoint_positions
    return positions <= set(header.checkpoint_positions) and np.array_equal(
        header.tokens, entry.tokens
    )


def _is_being_written(temporary: Path) -> bool:
    """Whether the process in a temporary name still runs, and did before the file was made.

    A container gives every engine the same process id.
    """
    pid, stat = temporary.stem.rpartition(".")[2], _stat(temporary)
    if not pid.isdigit() or stat is None:
        return False
    try:
        return psutil.Process(int(pid)).create_time() <= stat.st_mtime
    except psutil.Error:
        return False


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _remove(path: Path) -> None:
    """Remove a file, or leave it where that is not possible: a reply matters more."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed: %s", path.name, error)


def write_state(
    path: Path, fingerprint: str, tokens: NDArray[np.int32], payload: StatePayload
) -> None:
    """Write a state file; the name appears only when the file is whole.

    Raises:
        OSError: If the disk refuses; nothing is left behind then.
    """
    sections = [tokens.astype("<i4").tobytes(), payload.full, *payload.checkpoints.values()]
    header = json.dumps(
        {
            "fingerprint": fingerprint,
            "checkpoints": list(payload.checkpoints),
            "sections": [[len(s), _digest(s).hex()] for s in sections],
        }
    ).encode()
    temporary = path.with_suffix(f".{os.getpid()}.part")
    try:
        with open(temporary, "wb", opener=_private) as file:
            file.write(MAGIC + struct.pack("<I", len(header)) + header + _digest(header))
            for section in sections:
                file.write(section)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _private(name: str, flags: int) -> int:
    """Open a file for its owner alone: it holds what people said."""
    return os.open(name, flags, 0o600)


def read_header(path: Path) -> StateHeader:
    """The header and tokens of a state file.

    Raises:
        BadStateFile: If they are not sound.
        OSError: If the file cannot be read.
    """
    with _open(path) as file:
        return _read_header(file)[0]


def read_state(path: Path) -> tuple[StateHeader, StatePayload]:
    """All of a file, checked against its checksums.

    Raises:
        BadStateFile: If any byte is not what was written.
        OSError: If the file cannot be read.
    """
    with _open(path) as file:
        header, sections = _read_header(file)
        full, *states = [_read_section(file, section) for section in sections]
    positions = header.checkpoint_positions
    return header, StatePayload(full, dict(zip(positions, states, strict=True)))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        try:
            yield file
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise BadStateFile(f"{path.name}: {error}") from error


def _read_header(file: BinaryIO) -> tuple[StateHeader, list[tuple[int, bytes]]]:
    """The header with its tokens, and the sections that follow."""
    if file.read(len(MAGIC)) != MAGIC:
        raise BadStateFile("not a state file of this version")
    (n,) = struct.unpack("<I", file.read(4))
    if n > _MAX_HEADER_BYTES:
        raise BadStateFile(f"a header of {n} bytes")
    raw = file.read(n)
    if file.read(_DIGEST_BYTES) != _digest(raw):
        raise BadStateFile("the header is damaged")
    header = json.loads(raw)
    of_tokens, *others = [(int(n), bytes.fromhex(digest)) for n, digest in header["sections"]]
    if len(others) != 1 + len(header["checkpoints"]):
        raise BadStateFile("the header contradicts itself")
    n_left = os.fstat(file.fileno()).st_size - file.tell()
    n_more = n_left - of_tokens[0] - sum(size for size, _ in others)
    if n_more:
        raise BadStateFile(f"{n_more:+} bytes more than the header says")
    tokens = np.frombuffer(_read_section(file, of_tokens), "<i4").astype(np.int32)
    positions = tuple(header["checkpoints"])
    return StateHeader(str(header["fingerprint"]), tokens, positions), others


def _read_section(file: BinaryIO, section: tuple[int, bytes]) -> bytes:
    n_bytes, digest = section
    data = file.read(n_bytes)
    if len(data) != n_bytes or _digest(data) != digest:
        raise BadStateFile("a section is damaged")
    return data


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
