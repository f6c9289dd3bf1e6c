"""What a reply's bytes mean, and that it does not matter how they are split."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanorun.chat.parser import ReplyParser
from nanorun.model.chat import TextDelta, ThinkingDelta, ToolCallDelta

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"

Said = list[tuple[str, object]]


def read(
    pieces: Iterable[bytes],
    *,
    thinking: bool = False,
    stop: Sequence[str] = (),
    tools: Sequence[dict[str, object]] = (),
) -> tuple[Said, str | None]:
    """What a reply says, neighbouring deltas of a kind joined, and the stop string it met."""
    parser = ReplyParser(starts_in_thinking=thinking, stop=stop, tools=tools)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    said: Said = []
    for event in events:
        match event:
            case ToolCallDelta(_, call, problem):
                said.append(("call", (call.name, call.arguments, problem)))
            case ThinkingDelta(text) | TextDelta(text):
                kind = "thinking" if isinstance(event, ThinkingDelta) else "answer"
                assert text, "an event that says nothing"
                if said and said[-1][0] == kind:
                    text = f"{said.pop()[1]}{text}"
                said.append((kind, text))
    return said, parser.stopped_by


def said(text: str, **options: object) -> Said:
    """What a reply says, the same whole and byte by byte."""
    data = text.encode()
    whole = read([data], **options)  # type: ignore[arg-type]
    assert read([data[i : i + 1] for i in range(len(data))], **options) == whole  # type: ignore[arg-type]
    return whole[0]


def test_thinking_and_answer_come_apart() -> None:
    assert said("Let me see.\n</think>\nIt is 4.", thinking=True) == [
        ("thinking", "Let me see."),
        ("answer", "It is 4."),
    ]


@pytest.mark.parametrize("before", ["", "\n", "\n\n"])
@pytest.mark.parametrize("after", ["", "\n", "\n\n"])
def test_newlines_around_the_tags_are_markup(before: str, after: str) -> None:
    expected = [("thinking", "a\n\nb"), ("answer", "c\n d")]
    assert said(f"\na\n\nb{before}</think>{after}c\n d\n", thinking=True) == expected


def test_indentation_at_the_beginning_stays() -> None:
    assert said("  - a\n</think>\n    code", thinking=True) == [
        ("thinking", "  - a"),
        ("answer", "    code"),
    ]


def test_thinking_that_says_nothing_is_none() -> None:
    assert said("\n \n</think>\n\nHi", thinking=True) == [("answer", "Hi")]


def test_white_space_at_the_end_is_not_said() -> None:
    assert said("a b \n\t ") == [("answer", "a b")]


def test_thinking_that_never_ends_is_thinking() -> None:
    assert said("hmm <", thinking=True) == [("thinking", "hmm <")]


def test_a_reply_may_open_the_thinking_itself() -> None:
    assert said("\n<think>\na\n</think>\nb") == [("thinking", "a"), ("answer", "b")]
    assert said(" <think>a</think>b") == [("thinking", "a"), ("answer", "b")]


@pytest.mark.parametrize(
    ("reply", "thinking", "expected"),
    [
        ("<think>\na</think>b", True, [("thinking", "a"), ("answer", "b")]),
        ("a<think>b</think>c", True, [("thinking", "ab"), ("answer", "c")]),
        ("</think>\n\nb", False, [("answer", "b")]),
        ("a</think></think>\n</think>\nb", True, [("thinking", "a"), ("answer", "b")]),
        ("a</think>b</think>c", True, [("thinking", "a"), ("answer", "bc")]),
        ("a</tool_call>b", False, [("answer", "ab")]),
        ("</think>", False, []),
    ],
)
def test_orphan_tags_are_not_text(reply: str, thinking: bool, expected: Said) -> None:
    assert said(reply, thinking=thinking, tools=[ADD]) == expected


def test_an_answer_may_write_about_the_tags() -> None:
    text = "Write <think>...</think> around it."
    assert said(text) == [("answer", text)]
    assert said("x</think>" + text, thinking=True) == [("thinking", "x"), ("answer", text)]


@pytest.mark.parametrize("text", ["a < b", "x<y>z", "</thin king>", "<think", "<tool_cal>", "<<"])
def test_what_only_looks_like_a_tag_is_text(text: str) -> None:
    assert said(text) == [("answer", text)]


def test_text_is_held_back_no_longer_than_it_could_be_a_tag() -> None:
    parser = ReplyParser(starts_in_thinking=True)
    assert parser.feed(b"a<") == [ThinkingDelta("a")]
    assert parser.feed(b"/thin") == []
    assert parser.feed(b"g") == [ThinkingDelta("</thing")]


def test_parser_knows_whether_it_is_thinking() -> None:
    parser = ReplyParser(starts_in_thinking=True)
    parser.feed(b"a</think")
    assert parser.in_thinking
    parser.feed(b">")
    assert not parser.in_thinking


# -- tool calls -----------------------------------------------------------------------------------

CALLED = ("call", ("add", {"a": 1}, None))


def test_tool_call_is_an_event_of_its_own() -> None:
    text = f"Adding.\n\n{CALL}\n"
    assert said(text, tools=[ADD]) == [("answer", "Adding."), CALLED]


def test_tool_call_ends_the_thinking() -> None:
    parser = ReplyParser(starts_in_thinking=True, tools=[ADD])
    parser.feed(b"I need to add.\n<tool_call>")
    assert not parser.in_thinking
    assert said(f"I need to add.\n{CALL}\nDone.", thinking=True, tools=[ADD]) == [
        ("thinking", "I need to add."),
        CALLED,
        ("answer", "Done."),
    ]


def test_several_calls_are_counted() -> None:
    parser = ReplyParser(starts_in_thinking=False, tools=[ADD])
    events = parser.feed(f"{CALL}\n{CALL}{CALL}".encode())
    assert [event.index for event in events if isinstance(event, ToolCallDelta)] == [0, 1, 2]
    assert len({event.call.id for event in events if isinstance(event, ToolCallDelta)}) == 3
    assert parser.n_tool_calls == 3


def test_text_around_calls_keeps_its_distance() -> None:
    assert said(f"a\n{CALL}\nb", tools=[ADD]) == [("answer", "a"), CALLED, ("answer", "\n\nb")]


def test_thinking_may_go_on_after_a_call() -> None:
    assert said(f"a\n{CALL}\n<think>\nb\n</think>\nc", tools=[ADD]) == [
        ("answer", "a"),
        CALLED,
        ("thinking", "b"),
        ("answer", "c"),
    ]


def test_call_without_its_outer_tag_is_one_where_there_are_tools() -> None:
    bare = CALL.removeprefix("<tool_call>\n")
    assert said(f"{bare}\nb", tools=[ADD]) == [CALLED, ("answer", "b")]
    assert said("The form is <function=NAME>.") == [("answer", "The form is <function=NAME>.")]


@pytest.mark.parametrize("n_missing", range(1, len(CALL)))
def test_call_that_is_cut_off_never_passes_for_a_whole_one(n_missing: int) -> None:
    (_, (_, _, problem)), *_ = said(f"x{CALL}"[:-n_missing], tools=[ADD])[1:] or [
        (None, (None, None, "no call yet"))
    ]
    has_end_of_function = n_missing <= len("\n</tool_call>")
    assert (problem is None) == has_end_of_function


def test_stop_strings_are_not_looked_for_in_calls() -> None:
    assert said(f"{CALL}b 1", tools=[ADD], stop=["1"]) == [CALLED, ("answer", "b")]


# -- stop strings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "stop", "answer", "stopped_by"),
    [
        ("one END two", ["END"], "one", "END"),
        ("one EN two", ["END"], "one EN two", None),
        ("one EN", ["END"], "one EN", None),
        ("aab", ["ab"], "a", "ab"),
        ("aaaab", ["aab"], "aa", "aab"),
        ("abcd", ["bc", "abcd"], "a", "bc"),
        ("xabc", ["abc", "bc"], "x", "abc"),
        ("abc", ["abc", "ab"], "", "ab"),
        ("1\n2\n\n3", ["\n\n"], "1\n2", "\n\n"),
        ("\n\nhello\n\nyou", ["\n\n"], "hello", "\n\n"),
        ("grüße 日本語", ["本"], "grüße 日", "本"),
        ("a", [""], "a", None),
        ("a <think> b", ["<think>"], "a", "<think>"),
        ("a <tool_call> b", ["<tool_call>"], "a", "<tool_call>"),
    ],
)
def test_stop_string_ends_the_answer_and_is_no_part_of_it(
    reply: str, stop: list[str], answer: str, stopped_by: str | None
) -> None:
    assert said(reply, stop=stop) == ([("answer", answer)] if answer else [])
    assert read([reply.encode()], stop=stop)[1] == stopped_by


def test_thinking_is_not_searched_for_stop_strings() -> None:
    assert said("a.b\n</think>\n\nc.d", thinking=True, stop=[".", "\n"]) == [
        ("thinking", "a.b"),
        ("answer", "c"),
    ]


def test_nothing_follows_a_stop_string() -> None:
    parser = ReplyParser(starts_in_thinking=False, stop=["."])
    assert parser.feed(b"a.b") == [TextDelta("a")]
    assert parser.feed(f"c{CALL}".encode()) == []
    assert parser.finish() == []


# -- bytes ----------------------------------------------------------------------------------------


def test_characters_are_never_split() -> None:
    parser = ReplyParser(starts_in_thinking=False)
    texts = [
        event.text
        for byte in "é漢🧮👩‍🚀".encode()
        for event in parser.feed(bytes([byte]))
        if isinstance(event, TextDelta)
    ]
    assert "".join(texts) == "é漢🧮👩‍🚀"
    assert "\ufffd" not in texts


def test_bytes_that_are_no_utf8_are_replaced() -> None:
    assert read([b"a\xff", b"\xe6\xbc", b"b\xe6\xbc"]) == (
        [("answer", "a\ufffd\ufffdb\ufffd")],
        None,
    )


# -- any split of anything ------------------------------------------------------------------------

STOPS = ["", "ab", "abc", "ba", "\n\n", "<", "</", "think", "é", "aab", " \n"]
FRAGMENTS = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<function=add>", "</function>"),
        *("<parameter=a>", "</parameter>", '{"name": "add", "arguments": {"a": 1}}', CALL),
        *("<", "</", "<t", "\n", "\n\n", " ", "a", "b", "c", "1", "é", "漢", "🧮", "\x00"),
    ]
).map(str.encode)
REPLIES = st.lists(FRAGMENTS | st.binary(max_size=3), max_size=14).map(b"".join)


@settings(max_examples=3000, deadline=None)
@given(
    data=REPLIES,
    cuts=st.lists(st.integers(0, 200), max_size=12),
    thinking=st.booleans(),
    stop=st.lists(st.sampled_from(STOPS), max_size=3),
    has_tools=st.booleans(),
)
@example(b"abc", [2], False, ["abc", "ab"], False)
@example(b" \n\n\nx", [1], False, ["\n\n"], False)
def test_any_split_says_the_same(
    data: bytes, cuts: list[int], thinking: bool, stop: list[str], has_tools: bool
) -> None:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in pairwise(edges)]
    tools = [ADD] if has_tools else []
    whole = read([data], thinking=thinking, stop=stop, tools=tools)
    assert read(pieces, thinking=thinking, stop=stop, tools=tools) == whole
    single = [data[i : i + 1] for i in range(len(data))]
    assert read(single, thinking=thinking, stop=stop, tools=tools) == whole


@settings(max_examples=1500, deadline=None)
@given(
    reply=st.text("ab\n ", max_size=30),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_no_part_of_a_stop_string_is_ever_said(reply: str, stop: list[str]) -> None:
    parser = ReplyParser(starts_in_thinking=False, stop=stop)
    answer = ""
    for char in reply:
        answer += "".join(e.text for e in parser.feed(char.encode()) if isinstance(e, TextDelta))
        assert not any(text in answer for text in stop)
    text = reply.lstrip("\n")
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not ends:
        assert parser.stopped_by is None
    else:
        assert parser.stopped_by == max((s for s in stop if text[: min(ends)].endswith(s)), key=len)
        assert answer == text[: min(ends) - len(parser.stopped_by)].rstrip()


@settings(max_examples=1000, deadline=None)
@given(text=st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"])))
def test_text_without_tags_arrives_as_it_is(text: str) -> None:
    expected = text.lstrip("\n").rstrip()
    assert said(text) == ([("answer", expected)] if expected else [])


@pytest.mark.parametrize(
    ("unit", "options"),
    [
        ("</think>", {}),
        ("<think>", {"thinking": True}),
        ("<tool_call></tool_call>", {}),
        ("<function=</function>", {"tools": [ADD]}),
        ("<tool_call>" + "<parameter=x>" * 2, {}),
        ("<tool_call><function=f>" + "<parameter=x></parameter>y" * 2, {}),
        ("<tool_call>{", {}),
        ("<", {}),
        (" ", {}),
        ("\n", {"stop": ["\n" * 500 + "a"]}),
        ("a", {"stop": ["a" * 500 + "b", "aab"]}),
        ("</thin", {"thinking": True}),
    ],
)
def test_time_grows_with_length_alone(unit: str, options: dict[str, object]) -> None:
    def seconds(n_chars: int) -> float:
        data = (unit * (n_chars // len(unit))).encode()
        started = time.process_time()
        read([data], **options)  # type: ignore[arg-type]
        read([data[i : i + 4] for i in range(0, len(data), 4)], **options)  # type: ignore[arg-type]
        return time.process_time() - started

    seconds(2_000)
    # The best of a few: other programs take the cache away now and then.
    small, large = (min(seconds(n) for _ in range(3)) for n in (20_000, 160_000))
    # Quadratic time would be 64 times as long; the constant is for the clock's grain.
    assert large < 24 * small + 0.2
