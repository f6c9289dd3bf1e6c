"""Replies to raw prompts: the text as it comes, however it is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nanorun.chat.plain_text import PlainParser
from nanorun.model.chat import Event, TextDelta, ThinkingDelta


def read(pieces: list[bytes], *, thinks: bool = False, stop: tuple[str, ...] = ()) -> list[Event]:
    parser = PlainParser(starts_in_thinking=thinks, stop=stop)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return [*events, *parser.finish()]


def text_of(events: list[Event], kind: type = TextDelta) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


MARKUP = "\n\n <think>a</think> <tool_call>\n<function=f>\n</function>\n</tool_call> \n"


def test_text_comes_as_it_is() -> None:
    events = read([MARKUP.encode()])
    assert text_of(events) == MARKUP
    assert not text_of(events, ThinkingDelta)


def test_thinking_that_the_prompt_opened_is_told_apart() -> None:
    events = read([b"\nso \n", b"it is", b"\n</thi", b"nk>\n", b"\n4 \n</think>\n"], thinks=True)
    assert text_of(events, ThinkingDelta) == "so \nit is"
    assert text_of(events) == "4 \n</think>\n"


def test_stop_string_ends_the_text_and_not_the_thinking() -> None:
    parser = PlainParser(starts_in_thinking=True, stop=("82", "8 "))
    events = parser.feed(b"82</think>548") + parser.feed(b"2, 83") + parser.finish()
    assert (text_of(events, ThinkingDelta), text_of(events)) == ("82", "54")
    assert parser.stopped_by == "82"


def test_beginning_of_a_stop_string_is_text_in_the_end() -> None:
    assert text_of(read([b"a EN", b"D"], stop=("END.",))) == "a END"


texts = st.text(st.sampled_from("ab \n€<>/think82"), max_size=40)


@given(texts, st.lists(st.integers(1, 4), max_size=60), st.booleans())
def test_cuts_change_nothing(text: str, sizes: list[int], thinks: bool) -> None:
    data = text.encode()
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    pieces.append(data[at:])
    cut, whole = (read(p, thinks=thinks, stop=("82", "a b")) for p in (pieces, [data]))
    for kind in (ThinkingDelta, TextDelta):
        assert text_of(cut, kind) == text_of(whole, kind)
