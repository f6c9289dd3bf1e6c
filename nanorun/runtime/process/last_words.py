"""What of a dead process's last lines a person is shown; all of them go to the log."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

log = logging.getLogger(__name__)

# `/somebody/s/build/ggml.c:12: GGML_ASSERT(...) failed`, and the frames of a stack below it.
_OF_SOURCE = re.compile(
    r"\S*[/\\]\S+\.(?:c|cc|cpp|cu|h|hpp|m|metal):\d+:.*"
    r"|\S*\.(?:so|dylib|dll)[\w.]*\(.*|#\d+ .*|\[0x[0-9a-f]+\].*"
    r"|.*\bWARNING: Using native backtrace.*"
)


def shown(lines: Iterable[str]) -> list[str]:
    """The lines without those that speak of the source files of whoever built the engine."""
    lines = list(lines)
    for line in lines:
        log.debug("engine: %s", line)
    kept = [line for line in lines if not _OF_SOURCE.fullmatch(line)]
    if len(kept) < len(lines):
        kept.append("with --verbose, nanorun shows what it said of its source")
    return kept
