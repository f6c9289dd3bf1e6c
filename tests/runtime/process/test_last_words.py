"""What of a dead engine's last lines a person is shown."""

from __future__ import annotations

import logging

import pytest

from nanorun.runtime.process.last_words import shown

ABORT = "/home/somebody/build/llama.cpp/src/llama-model.cpp:1362: GGML_ASSERT(n <= n_expert) failed"
FRAMES = [
    "/opt/lib/libggml-base.so(+0x1a2b3)[0x7f]",
    "#3 0x7f in ggml_abort ()",
    "[0x7ffe00]",
    r"C:\build\ggml\src\ggml.c:12: GGML_ASSERT(x) failed",
]


@pytest.mark.parametrize("line", [ABORT, *FRAMES])
def test_what_speaks_of_source_files_goes_to_the_log(
    line: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="nanorun"):
        kept = shown(["loading", line])
    assert kept[0] == "loading"
    assert line not in kept
    assert len(kept) == 2
    assert f"engine: {line}" in caplog.messages


@pytest.mark.parametrize(
    "line", ["out of memory", "ValueError: a/b.c is no model", "GGML_ASSERT(something) failed"]
)
def test_other_lines_are_shown(line: str) -> None:
    assert shown([line]) == [line]
