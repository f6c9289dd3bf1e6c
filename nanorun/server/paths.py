"""Paths as clients write them: one slash or `/v1` too many still means one route."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

_SLASHES = re.compile(r"/{2,}")
_VERSIONS = re.compile(r"^(/v1)+(?=/|$)")
_N_NEAR = 3


def plain(path: str) -> str:
    """`//v1/v1/models/` as `/v1/models`."""
    path = _SLASHES.sub("/", f"/{path}")
    return _VERSIONS.sub("/v1", path).rstrip("/") or "/"


def near(path: str, known: Iterable[str]) -> list[str]:
    """The routes that somebody who asked for `path` may have meant, the likeliest first."""
    known = sorted(set(known))
    by_end = [route for route in known if path != "/" and route.endswith(path)]
    alike = [r for r in get_close_matches(path, known, _N_NEAR, cutoff=0.6) if r not in by_end]
    return (by_end + alike)[:_N_NEAR]
