"""The corpus: the smallest input of every case that went wrong, and of every fault found since.

A line of a `.jsonl` file is one seed. Files are named for the case they come from.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).with_name("corpus")


@cache
def seeds(target: str) -> list[Any]:
    """The seeds of one target; not to be changed."""
    files = sorted((CORPUS / target).glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert lines, f"no seeds of {target}"
    return [json.loads(line) for line in lines]
