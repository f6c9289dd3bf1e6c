"""What the command line writes, and where: data to stdout, talk to stderr.

Commands write through this module, so that colour, closed pipes, full disks and terminals are
handled once.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import logging
import os
import re
import select
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from nanorun.errors import NanorunError

_PREFIX = "nanorun: error:"
_BOLD_RED, _DIM, _RESET = "\x1b[1;31m", "\x1b[2m", "\x1b[0m"
# Back to the first column and clear the line.
_ERASE = "\r\x1b[K"

_SURROGATE = re.compile("[\ud800-\udfff]")
# A model may write escape sequences; on a terminal they could move the cursor or set its title.
_CONTROL = {code: None for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if code not in (9, 10)}


def prepare_streams() -> None:
    """Make writing safe: no stream is missing, and no character fails for want of a code."""
    # Python has None where the caller closed a stream (`2>&-`). The files stay open on purpose.
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115
    sys.stdout = sys.stdout or _ClosedOutput()
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=_encoding(stream), errors="replace")


def _encoding(stream: io.TextIOWrapper) -> str:
    """The stream's encoding; UTF-8 where it is ASCII because the locale says nothing (`C`)."""
    is_ascii = codecs.lookup(stream.encoding).name == "ascii"
    return "utf-8" if is_ascii and not os.environ.get("PYTHONIOENCODING") else stream.encoding


class _ClosedOutput(io.TextIOBase):
    """Stands for a stdout that the caller closed: what is written there is refused, not lost."""

    def __init__(self) -> None:
        # Holds the descriptor, or the next file that is opened would be standard output.
        self._sink = Path(os.devnull).open("wb")  # noqa: SIM115

    def write(self, _text: str) -> int:
        raise OSError(errno.EBADF, "it is closed")


def is_terminal(stream: TextIO) -> bool:
    """Whether a person sees the stream; False for one that is closed."""
    try:
        return stream.isatty()
    except ValueError:
        return False


def uses_color(stream: TextIO) -> bool:
    """Whether escape sequences for colour belong on the stream (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return is_terminal(stream) and not plain


def show_error(error: NanorunError) -> None:
    """Write an error to stderr in the contract's layout."""
    prefix = f"{_BOLD_RED}{_PREFIX}{_RESET}" if uses_color(sys.stderr) else _PREFIX
    talk(f"{prefix} {error.render()}\n")


def talk(text: str) -> None:
    """Write to stderr; nobody listening is no failure."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def note(text: str) -> None:
    """Tell something worth knowing that stops nothing."""
    talk(f"nanorun: {text}\n")


def show_logs(*, verbose: bool, requests: bool = False) -> None:
    """Send what the parts of nanorun log to stderr.

    Args:
        verbose: Whether all of it is shown, not only warnings.
        requests: Whether the endpoint's requests are shown, too.
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="nanorun: %(message)s")
    logging.getLogger("nanorun").setLevel(logging.DEBUG if verbose else logging.NOTSET)
    if requests:
        of_requests = logging.getLogger("nanorun.server.request_log")
        of_requests.setLevel(logging.DEBUG if verbose else logging.INFO)
        of_requests.addFilter(stderr_has_room)


def stderr_has_room(_record: object = None) -> bool:
    """Whether stderr takes a line now.

    A paused terminal, or a program that does not read what it started, must not hold an endpoint
    up: lines that nobody would wait for are dropped then.
    """
    try:
        return bool(select.select([], [sys.stderr], [], 0)[1])
    except (OSError, ValueError):  # Windows asks so of sockets only; a test's stream is no file
        return True


def dim(text: str) -> str:
    """The text for stderr in a quiet colour, where there is colour."""
    return f"{_DIM}{text}{_RESET}" if uses_color(sys.stderr) else text


def write_data(text: str) -> None:
    """Write to stdout at once.

    Raises:
        BrokenPipeError: If the reader is gone.
        NanorunError: If it cannot be written for another reason (a full disk).
    """
    with _explained():
        sys.stdout.write(text.translate(_CONTROL) if is_terminal(sys.stdout) else text)
        sys.stdout.flush()


def write_json(value: Mapping[str, Any]) -> None:
    """Write one JSON object to stdout, for `--json`.

    Bytes of file names that are no text (PEP 383) are escaped, so that Python reads them back.
    """
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    write_data(_SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", text))


def flush_data() -> None:
    """Push stdout out; raises as `write_data` does."""
    with _explained():
        sys.stdout.flush()


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise NanorunError(f"standard output cannot be written: {reason}") from error


def drop_unwritable_data() -> None:
    """Let go of data that stdout refuses, or the interpreter would complain again at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)


def printable(text: str) -> str:
    """The text without characters that would steer a terminal, if stderr is one."""
    return text.translate(_CONTROL) if is_terminal(sys.stderr) else text


class StatusLine:
    """One line on a terminal's stderr that is written over; silent elsewhere."""

    def __init__(self) -> None:
        self._active = is_terminal(sys.stderr)
        self._shown = False

    def show(self, text: str) -> None:
        """Replace the line."""
        if self._active:
            talk(_ERASE + dim(text))
            self._shown = True

    def clear(self) -> None:
        """Take the line away, before anything else is written."""
        if self._shown:
            talk(_ERASE)
            self._shown = False
