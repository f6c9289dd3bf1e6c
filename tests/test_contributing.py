"""What CONTRIBUTING says of files is so."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
WORDS = TEXT.split("## Words")[1].split("\n## ")[0]


def test_words_stand_in_the_files_that_explain_them() -> None:
    rows = re.findall(r"^\| ([a-z][^|]*) \|[^|]*\|[^|]*\| (`[^|]*`) \|$", WORDS, re.MULTILINE)
    assert len(rows) > 20
    for words, files in rows:
        texts = [(ROOT / name).read_text("utf-8").lower() for name in re.findall(r"`(.*?)`", files)]
        for word in words.split(", "):
            # "frame of padding" is PadFrame there.
            assert any(word.split(" of ")[0] in text for text in texts), word


def test_files_named_in_full_exist() -> None:
    names = re.findall(r"`((?:nanorun|converters|quant|tests|scripts|docs)/[\w./]*)`", TEXT)
    assert len(names) > 50
    assert not [name for name in names if not (ROOT / name).exists()]
