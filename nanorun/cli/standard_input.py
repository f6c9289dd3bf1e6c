"""Standard input of a command: read when it is meant, left alone when it belongs to others.

Beside a prompt it may be anything: a file to be asked about, the terminal, the list that a shell's
loop reads line by line, a pipe that a service or an editor opened and never writes to.
"""

from __future__ import annotations

import os
import select
import stat
import sys

from nanorun.cli.diagnostics import StatusLine, note

# Programs that write something begin within this; one that begins later is waited for with `-`.
_FIRST_BYTE_S = 5.0
_CHUNK_BYTES = 2**20


def read_all() -> bytes:
    """Everything up to the end, which a person is told about if it takes long."""
    fd = _file_number()
    if fd is None:
        return sys.stdin.buffer.read()
    chunks: list[bytes] = []
    is_told = False
    while True:
        if not is_told and not _is_readable(fd, _FIRST_BYTE_S):
            note("waiting for the end of standard input")
            is_told = True
        chunk = os.read(fd, _CHUNK_BYTES)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)


def read_beside_prompt() -> bytes:
    """What standard input adds to a prompt that was given; nothing if it is not meant for it.

    A file is read unless somebody has read from it before, as a shell's loop does. A pipe is read
    if it brings something soon. Terminals and other devices are not read.
    """
    fd = _file_number()
    if fd is None:
        return sys.stdin.buffer.read()
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        is_untouched = os.lseek(fd, 0, os.SEEK_CUR) == 0
        return read_all() if is_untouched else b""
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return b""
    if not _begins(fd):
        note(
            f"standard input brought nothing in {_FIRST_BYTE_S:.0f} s and is left alone"
            " (`-` after the prompt waits for it, `< /dev/null` says that there is none)"
        )
        return b""
    return read_all()


def _begins(fd: int) -> bool:
    """Whether a pipe brings its first bytes, or its end, soon."""
    status = StatusLine()
    status.show("waiting for standard input ...")
    try:
        return _is_readable(fd, _FIRST_BYTE_S)
    finally:
        status.clear()


def _is_readable(fd: int, timeout_s: float) -> bool:
    if os.name != "posix":  # Windows tells this of sockets only: reading waits there
        return True
    return bool(select.select([fd], [], [], timeout_s)[0])


def _file_number() -> int | None:
    """The stream's descriptor; None for a stream of Python's own, which never waits."""
    try:
        return sys.stdin.fileno()
    except (OSError, ValueError):
        return None
