"""What a file is that should be a model's and is not, told by its first bytes."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 512
"""Enough of a file to tell."""

_LFS = b"version https://git-lfs.github.com/spec/"
_APPLE_DOUBLE = b"\x00\x05\x16\x07"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_PAGES = (b"<!doctype html", b"<html", b"<?xml")


@dataclass(frozen=True, slots=True)
class LookAlike:
    """What stands in the place of a file."""

    what: str
    facts: tuple[str, ...] = ()
    tries: tuple[str, ...] = ()


def look_alike(head: bytes, path: str) -> LookAlike | None:
    """What the file at `path` is instead, or None where its first bytes are nothing known.

    Args:
        head: Its first `HEAD_BYTES`, fewer where it is shorter.
        path: Where it is.
    """
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    folder = shlex.quote(str(Path(path).parent))
    if text.startswith(_LFS):
        return LookAlike(
            "a Git LFS pointer, not the file that it points to",
            ("the repository was cloned without git-lfs",),
            ("git lfs install", f"git -C {folder} lfs pull"),
        )
    if text.startswith(_PAGES):
        return LookAlike(
            "a web page", ("the page about the file was saved, or an error in its place",)
        )
    if head.startswith(_APPLE_DOUBLE):
        return LookAlike("what macOS leaves beside a file of this name without '._'")
    if head.startswith(b"PK\x03\x04"):
        return LookAlike("a zip archive, as PyTorch's own checkpoints are")
    if head.startswith(_UTF16):
        return LookAlike("text in UTF-16")
    if head and not head.strip(b"\0"):
        return LookAlike("a file of zeros, such as a download that was cut off leaves")
    return None
