from __future__ import annotations

import pytest

from nanorun.errors import UsageError
from nanorun.model.think import Think, grace_tokens


@pytest.mark.parametrize(
    ("text", "think"),
    [
        ("off", Think(0, "off")),
        ("low", Think(512, "low")),
        (" HIGH", Think(16384, "high")),
        ("max", Think(None, "max")),
        ("0", Think(0)),
        ("77", Think(77)),
        (64, Think(64)),
    ],
)
def test_depth_is_a_level_or_a_count(text: str | int, think: Think) -> None:
    assert Think.parse(text) == think
    assert Think.parse(str(think)) == think


@pytest.mark.parametrize("text", ["", "hard", "-1", "1.5", "²"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="reasoning depth"):
        Think.parse(text)


def test_thinking_may_land_within_a_tenth_of_its_budget_or_32_tokens() -> None:
    assert [grace_tokens(budget) for budget in (0, 100, 320, 4096)] == [32, 32, 32, 409]
