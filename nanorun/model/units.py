"""Sizes and counts as people write and read them: `16GiB`, `256k`, `24.1 GiB`."""

from __future__ import annotations

import re

from nanorun.errors import UsageError

KIB = 2**10
MIB = 2**20
GIB = 2**30
TIB = 2**40

# A bare letter is binary, as in every tool that takes memory limits (docker, systemd).
_SIZE_UNITS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 10**3,
    "m": MIB, "mib": MIB, "mb": 10**6,
    "g": GIB, "gib": GIB, "gb": 10**9,
    "t": TIB, "tib": TIB, "tb": 10**12,
}  # fmt: skip
_COUNT_UNITS = {"": 1, "k": KIB, "m": MIB}
_DURATION_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_NUMBER_AND_UNIT = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([a-z]*)", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes named by `16GiB`, `14.6GB`, `512MiB`, `24G` (binary) or a plain number.

    Raises:
        UsageError: If the text is no size.
    """
    n_bytes = _parse(text, _SIZE_UNITS)
    if n_bytes is None:
        raise UsageError(
            f"not a size: {text!r}",
            facts=["a size is a number with an optional unit: 16GiB, 14.6GB, 512MiB, 1000"],
        )
    return int(n_bytes)


def parse_count(text: str) -> int:
    """Tokens named by `8192`, `256k` (256 x 1024) or `1M` (1024 x 1024).

    Raises:
        UsageError: If the text is no whole, positive number of tokens.
    """
    n_tokens = _parse(text, _COUNT_UNITS)
    if n_tokens is None or n_tokens < 1 or n_tokens != int(n_tokens):
        raise UsageError(
            f"not a number of tokens: {text!r}",
            facts=["write it as 8192, 256k (262144) or 1M (1048576)"],
        )
    return int(n_tokens)


def parse_duration(text: str) -> float:
    """Seconds named by `90`, `30s`, `5m`, `2h` or `1d`.

    Raises:
        UsageError: If the text is no duration.
    """
    seconds = _parse(text, _DURATION_UNITS)
    if seconds is None:
        raise UsageError(f"not a duration: {text!r}", facts=["write it as 90, 30s, 5m, 2h or 1d"])
    return float(seconds)


def format_gib(n_bytes: int) -> str:
    """The size in the largest binary unit it fills: `24.1 GiB`, `47.6 MiB`, `512 B`."""
    for unit, unit_bytes in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        # 1023.96 MiB would print as "1024.0 MiB", so the comparison is made on what is printed.
        if round(n_bytes / unit_bytes, 1) >= 1:
            return f"{n_bytes / unit_bytes:.1f} {unit}"
    return f"{n_bytes} B"


def _parse(text: str, units: dict[str, int]) -> float | None:
    match = _NUMBER_AND_UNIT.fullmatch(text.strip().lower())
    if match is None or match[2] not in units:
        return None
    number, unit_value = match[1], units[match[2]]
    # Whole numbers stay integers: a float would lose bytes above 2**53.
    return float(number) * unit_value if "." in number else int(number) * unit_value
