"""File names as texts for people."""

from __future__ import annotations

import os


def readable(text: str) -> str:
    """A text that may hold file names, without what is no text in them.

    Python keeps a name's bytes that it cannot read as halves of surrogate pairs (PEP 383), which no
    UTF-8 file, terminal or JSON body takes. Here they become characters, or U+FFFD.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return _as_bytes(text).decode("utf-8", "replace")
    return text


def _as_bytes(text: str) -> bytes:
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:  # other halves, or names beside text that the locale cannot write
        return text.encode("utf-8", "replace")
