from __future__ import annotations

import pytest

from nanorun.errors import NanorunError
from nanorun.file_names import readable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("pico.gguf", "pico.gguf"),
        ("größe-漢", "größe-漢"),
        ("caf\udce9.gguf", "caf\N{REPLACEMENT CHARACTER}.gguf"),
        ("caf\udcc3\udca9", "café"),  # UTF-8, read under `LC_ALL=C`
        ("\ud800x", "?x"),
    ],
)
def test_names_become_text(text: str, shown: str) -> None:
    assert readable(text) == shown


def test_error_about_any_file_can_be_written_anywhere() -> None:
    error = NanorunError("caf\udce9 is gone", facts=["caf\udce9"], tries=["rm caf\udce9"])
    assert "\udce9" not in error.render() + str(error)
