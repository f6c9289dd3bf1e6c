"""Text and numbers as the terminal can show them."""

from __future__ import annotations

import re

# A model may emit any character. ESC and its like would reach the terminal as commands, and the
# exotic line ends are lines to `str.splitlines` (Textual) but not to Markdown, which then
# disagree about where a block starts. Tab and newline stay.
_LINE_ENDS = re.compile("\r\n|[\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """The text with every line end as a newline and every control character made visible."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", _LINE_ENDS.sub("\n", text))


def count_label(n: int) -> str:
    """A count in at most five characters: `312`, `8,192`, `12k`, `1.0M`; k is 1024, as in n_ctx."""
    if n < 10_000:
        return f"{n:,}"
    if n < 2**20:
        return f"{n / 2**10:.0f}k"
    return f"{n / 2**20:.1f}M"


def params_label(n: int) -> str:
    """Parameters as models are named by them: `3.6M`, `31.6B`."""
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"


def seconds_label(seconds: float) -> str:
    """A duration: `3.2 s`, `1 min 05 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
