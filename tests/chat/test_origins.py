"""Where the text that comes out of a reply stood in it, whatever the reply and its cuts."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from nanorun.chat.parser import ReplyParser
from nanorun.chat.plain_text import PlainParser
from nanorun.model.chat import Event, TextDelta, ThinkingDelta, ToolCallDelta
from tests.chat.test_parser_fuzz import TOOL, cut, draw_reply

N_REPLIES = 3000
CALL = "<tool_call>\n<function=calc>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"

Parser = ReplyParser | PlainParser


def texts_of(events: Iterable[Event]) -> tuple[str, str]:
    """The thinking and the answer, without the blank lines set after calls."""
    thinking, answer, follows_call = "", "", False
    for event in events:
        match event:
            case ThinkingDelta(text):
                thinking += text
            case TextDelta(text):
                answer += text.removeprefix("\n\n") if follows_call else text
        if isinstance(event, TextDelta | ThinkingDelta | ToolCallDelta):
            follows_call = isinstance(event, ToolCallDelta)
    return thinking, answer


def texts_by_origin(parser: Parser, text: str) -> tuple[str, str]:
    """The same, as it stands in the reply."""
    found = {True: "", False: ""}
    for stretch in parser.origins.stretches:
        found[stretch.in_thinking] += text[stretch.start : stretch.end]
    return found[True], found[False]


def check(parser: Parser, pieces: list[bytes]) -> None:
    events: list[Event] = []
    n_settled = 0
    for i in range(len(pieces) + 1):
        n_out = sum(stretch.end - stretch.start for stretch in parser.origins.stretches)
        events += parser.feed(pieces[i]) if i < len(pieces) else parser.finish()
        for stretch in parser.origins.stretches:  # what comes out now was not settled before
            n_here = stretch.end - stretch.start
            assert n_out >= n_here or stretch.end > n_settled
            n_out = max(0, n_out - n_here)
        assert n_settled <= parser.n_settled <= parser.origins.n_read
        n_settled = parser.n_settled
    text = b"".join(pieces).decode("utf-8", "replace")
    assert texts_by_origin(parser, text) == texts_of(events), (pieces, parser.origins)
    assert n_settled == parser.origins.n_read


@pytest.mark.parametrize("is_plain", [False, True])
def test_text_is_where_it_is_said_to_be(is_plain: bool) -> None:
    rng = random.Random(0)
    n_texts = 0
    for _ in range(N_REPLIES):
        pieces = cut(draw_reply(rng), rng)
        thinks, stop = rng.random() < 0.5, rng.choice([[], ["STOP"], ["STOP", "</think>"]])
        parser: Parser = PlainParser(starts_in_thinking=thinks, stop=stop)
        if not is_plain:
            tools = [TOOL] if rng.random() < 0.6 else []
            parser = ReplyParser(starts_in_thinking=thinks, stop=stop, tools=tools)
        check(parser, pieces)
        n_texts += bool(parser.origins.stretches)
    assert n_texts > N_REPLIES / 4


@pytest.mark.parametrize(
    "text",
    [
        "a \n</think> b",
        f" a\n{CALL}\n b",
        f"a<tool_call> text {CALL.removeprefix('<tool_call>')} after",
        "a<tool_call>text <tool_call>",
        "a <function=calc",
        "a <function=none>b",
    ],
)
def test_text_around_tags_and_calls_is_found(text: str) -> None:
    for pieces in ([text.encode()], [bytes([byte]) for byte in text.encode()]):
        check(ReplyParser(starts_in_thinking=False, tools=[TOOL]), pieces)


def test_control_tokens_are_counted() -> None:
    parser = ReplyParser(starts_in_thinking=True, tools=[TOOL])
    pieces = [
        "so",
        "</think>",
        "\n",
        "a",
        "<tool_call>",
        "text ",
        "<tool_call>",
        "b",
        "</tool_call>",
    ]
    events = [
        event
        for piece in pieces
        for event in parser.feed(piece.encode(), control=piece.startswith("<"))
    ]
    events += parser.feed(b" c") + parser.finish()
    text = "".join(pieces) + " c"
    assert parser.origins.n_read == len(text)
    assert texts_by_origin(parser, text) == texts_of(events)
    assert texts_of(events)[0] == "so" and texts_of(events)[1].startswith("a")
