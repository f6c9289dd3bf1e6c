"""A hundred thousand replies that no model would write, each cut in several ways."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from nanorun.chat.parser import ReplyParser
from nanorun.model.chat import Event, TextDelta, ThinkingDelta, ToolArguments
from tests.support.calls import assert_told

N_REPLIES = 100_000
TOOL = {
    "name": "calc",
    "parameters": {
        "properties": {"x": {"type": "string"}, "n": {"type": "integer"}},
        "required": ["x"],
    },
}
FRAGMENTS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "</function>", "</parameter>"),
    *("<function=calc>", "<function=", "<function=y>", "<parameter=x>", "<parameter=n>\n"),
    *("<parameter=", "</parameter", "\n", "\n\n", " ", "\r\n", "a", "7", "é", "漢", "🧮", "\\"),
    *("{", "}", "[", "]", '"', ":", ",", "```json\n", "```", "<", "</", "STOP", "ST", "calc"),
    *('{"name": "calc", "arguments": {"x": "1"}}', "<tool_call>\n<function=calc>\n<parameter=x>\n"),
    "\n</parameter>\n</function>\n</tool_call>",
]


def draw_reply(rng: random.Random) -> bytes:
    data = bytearray("".join(rng.choices(FRAGMENTS, k=rng.randint(0, 24))).encode())
    if rng.random() < 0.3:
        for _ in range(rng.randint(0, 4)):
            data.insert(rng.randint(0, len(data)), rng.randint(0, 255))
    return bytes(data)


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    edges = [0, *sorted(rng.randint(0, len(data)) for _ in range(rng.randint(0, 12))), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def read(
    pieces: Sequence[bytes], thinking: bool, stop: list[str], tools: list[dict[str, object]]
) -> tuple[list[Event], str | None]:
    """What a reply says, neighbouring texts joined, and the stop string it met."""
    parser = ReplyParser(starts_in_thinking=thinking, stop=stop, tools=tools, id_prefix="")
    events: list[Event] = []
    for event in [e for piece in pieces for e in parser.feed(piece)] + parser.finish():
        last = events[-1] if events else None
        if isinstance(event, TextDelta) and isinstance(last, TextDelta):
            events[-1] = TextDelta(last.text + event.text)
        elif isinstance(event, ThinkingDelta) and isinstance(last, ThinkingDelta):
            events[-1] = ThinkingDelta(last.text + event.text)
        elif isinstance(event, ToolArguments) and isinstance(last, ToolArguments):
            events[-1] = ToolArguments(event.index, last.text + event.text)
        else:
            events.append(event)
    return events, parser.stopped_by


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_any_cut_of_any_bytes_says_the_same(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(N_REPLIES // 4):
        data = draw_reply(rng)
        thinking = rng.random() < 0.5
        stop = rng.choice([[], ["STOP"], ["STOP", "</think>"], ["T", "7\n"]])
        tools: list[dict[str, object]] = [TOOL] if rng.random() < 0.6 else []
        whole = read([data], thinking, stop, tools)
        single = [data[i : i + 1] for i in range(len(data))]
        for pieces in (single, cut(data, rng)):
            assert read(pieces, thinking, stop, tools) == whole, (data, thinking, stop, tools)
        assert_told(whole[0])
