from __future__ import annotations

from pathlib import Path

from nanorun.server.policy import LABELS, NEUTRAL, REFUSED, SYNONYMS, policy_table

DOCS = Path(__file__).parents[2] / "docs" / "endpoints.md"


def test_documentation_shows_the_table() -> None:
    text = DOCS.read_text(encoding="utf-8")
    _, _, shown = text.partition("tests/server/test_policy.py -->\n")
    assert shown.partition("\n<!-- end -->")[0] == policy_table()


def test_no_field_has_two_fates() -> None:
    assert not LABELS.keys() & (NEUTRAL.keys() | SYNONYMS.keys() | REFUSED.keys())
    assert not REFUSED.keys() & (NEUTRAL.keys() | SYNONYMS.keys())
