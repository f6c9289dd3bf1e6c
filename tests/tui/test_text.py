from __future__ import annotations

import pytest

from nanorun.tui.text import count_label, params_label, printable, seconds_label


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, tab\there", "plain, tab\there"),
        ("two\r\nlines", "two\nlines"),
        ("bare\rreturn", "bare\nreturn"),
        ("form\ffeed and \u2028 separator", "form\nfeed and \n separator"),
        ("\x1b[31mred\x1b[0m", "\ufffd[31mred\ufffd[0m"),
        ("bell \x07, del \x7f, csi \x9b", "bell \ufffd, del \ufffd, csi \ufffd"),
        ("é 漢字 👩‍👩‍👧 e\u0301", "é 漢字 👩‍👩‍👧 e\u0301"),
    ],
)
def test_printable_shows_controls_and_keeps_the_rest(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("n", "label"),
    [(0, "0"), (312, "312"), (8192, "8,192"), (12_345, "12k"), (262_144, "256k"), (2**20, "1.0M")],
)
def test_count_label_is_short(n: int, label: str) -> None:
    assert count_label(n) == label


def test_params_label_names_models_as_people_do() -> None:
    assert params_label(3_600_000) == "3.6M"
    assert params_label(31_577_937_344) == "31.6B"


@pytest.mark.parametrize(
    ("seconds", "label"), [(0.04, "0.0 s"), (3.21, "3.2 s"), (65.4, "1 min 05 s")]
)
def test_seconds_label_changes_unit_at_a_minute(seconds: float, label: str) -> None:
    assert seconds_label(seconds) == label
