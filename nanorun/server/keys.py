"""Keys that let a request in, and the names they go by in logs.

A key is never shown; whoever reads a log or /slots sees its name.
"""

from __future__ import annotations

import hmac
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from nanorun.errors import UsageError

log = logging.getLogger(__name__)

# A colon may be part of a key; one after a name and before the key ends the name.
_NAMED = re.compile(r"(?P<name>[\w.-]{1,64})\s*:\s*(?P<value>\S.*)")
_OTHERS = 0o077
"""Permission bits of group and others."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key and its name."""

    name: str
    """Empty for one without a name, until it is `numbered`."""
    value: str

    def __repr__(self) -> str:
        return f"ApiKey({self.name!r})"


class Keyring:
    """The keys of an endpoint.

    Args:
        keys: Any of them lets a request in.
    """

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._keys = [(key.name, key.value.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def name_of(self, token: bytes) -> str | None:
        """The name of a key; None for one that is not known."""
        found = None
        # Every key is compared in full, so that the time taken tells nothing about any of them.
        for name, key in self._keys:
            if hmac.compare_digest(token, key):
                found = name
        return found


def numbered(keys: Iterable[ApiKey]) -> tuple[ApiKey, ...]:
    """The keys, those without a name named by their place: `key-1`, `key-2`, ..."""
    return tuple(
        key if key.name else ApiKey(f"key-{i}", key.value) for i, key in enumerate(keys, start=1)
    )


def read_keys(text: str, where: str) -> tuple[ApiKey, ...]:
    """The keys of a text: `name: key` or `key`, one a line; `#` begins a comment line.

    Args:
        text: The lines.
        where: Where they stand, for messages.

    Raises:
        UsageError: If a line names no key, or there is none.
    """
    keys: list[ApiKey] = []
    for n_line, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        named = _NAMED.fullmatch(line)
        if named is None and line.endswith(":"):
            raise UsageError(f"{where}, line {n_line}: there is no key after the name")
        keys.append(ApiKey(named["name"], named["value"]) if named else ApiKey("", line))
    if not keys:
        raise UsageError(f"{where} holds no key", facts=["write `name: key` or `key`, one a line"])
    return tuple(keys)


def read_key_file(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file, with a warning if others can read it.

    Raises:
        UsageError: If it cannot be read or holds no keys.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        mode = path.stat().st_mode
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"--api-key-file {path} cannot be read: {reason}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--api-key-file {path} is not UTF-8 text") from error
    # Windows has no such bits, and a pipe (`<(pass show keys)`) is read once.
    if os.name == "posix" and S_ISREG(mode) and mode & _OTHERS:
        log.warning("%s can be read by other users of this machine: chmod 600 %s", path, path)
    return read_keys(text, f"--api-key-file {path}")


def check_distinct(keys: Iterable[ApiKey]) -> None:
    """Refuse keys that nobody could tell apart.

    Raises:
        UsageError: If a key is empty, or two have the same name or value.
    """
    names: set[str] = set()
    values: set[str] = set()
    for key in keys:
        if not key.value.strip():
            raise UsageError("an API key is empty")
        if key.name in names:
            raise UsageError(f"two API keys are named {key.name!r}; a name says whose a request is")
        if key.value in values:
            raise UsageError(f"the API key {key.name!r} is there twice, under two names")
        names.add(key.name)
        values.add(key.value)
