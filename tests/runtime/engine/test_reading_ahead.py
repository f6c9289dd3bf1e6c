"""Whose next turn is read ahead, and when."""

from __future__ import annotations

from typing import Any

import pytest

from nanorun.errors import UsageError
from nanorun.model.chat import GenerateOptions, Message
from nanorun.model.reply_so_far import ReplySoFar
from nanorun.runtime.engine import reading_ahead
from nanorun.runtime.engine.reading_ahead import ReadingAhead, Turn, begin_turn, prepare_readings

MODEL: Any = object()


def turn(text: str, **options: Any) -> Turn:
    reply = ReplySoFar(thinking="hm", answer=f"re: {text}")
    return Turn([Message("user", text)], GenerateOptions(**options), reply)


@pytest.fixture(autouse=True)
def what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are shown by the texts that they read."""

    def prepare(
        request_id: str,
        _model: Any,
        messages: list[Message],
        reply: Message,
        _options: Any,
        _check: Any,
    ) -> Any:
        if messages[0].content == "unrenderable":
            raise UsageError("no")
        return (request_id, messages[0].content, reply.thinking)

    monkeypatch.setattr(reading_ahead, "prepare_reading", prepare)


def read_next(ahead: ReadingAhead) -> list[Any] | None:
    """What the next turn is read with; None if none waits."""
    found = ahead.next()
    return (
        None if found is None else list(prepare_readings(found[0], MODEL, found[1], lambda: None))
    )


def test_the_newest_turn_comes_first_and_each_once() -> None:
    ahead = ReadingAhead()
    for name in ("a", "b"):
        ahead.add(name, turn(name, echo_thinking=False))
    assert read_next(ahead) == [("b", "b", None)]
    assert read_next(ahead) == [("a", "a", None)]
    assert read_next(ahead) is None


def test_both_forms_of_a_reply_are_read_where_it_is_not_known_which_comes_back() -> None:
    ahead = ReadingAhead()
    ahead.add("a", turn("a", echo_thinking=None))
    assert read_next(ahead) == [("a", "a", None), ("a", "a", "hm")]


def test_what_was_interrupted_is_read_another_time() -> None:
    ahead = ReadingAhead()
    ahead.add("a", turn("a", echo_thinking=False))
    ahead.next()
    assert ahead.interrupt([Message("user", "somebody else")]) == "a"
    assert ahead.interrupt([Message("user", "somebody else")]) is None
    assert read_next(ahead) == [("a", "a", None)]
    assert read_next(ahead) is None


def test_conversation_that_went_on_is_not_read_any_more() -> None:
    ahead = ReadingAhead()
    ahead.add("a", turn("a"))
    ahead.add("b", turn("b", echo_thinking=False))
    ahead.interrupt([*turn("a").messages, Message("assistant", "x"), Message("user", "more")])
    assert read_next(ahead) == [("b", "b", None)]
    assert read_next(ahead) is None


def test_only_so_many_turns_wait() -> None:
    ahead = ReadingAhead()
    for i in range(100):
        ahead.add(str(i), turn(str(i)))
    names = []
    while (requests := read_next(ahead)) is not None:
        names.append(requests[0][0])
    assert names == [str(i) for i in range(99, 99 - reading_ahead._MOST_WAITING, -1)]


def test_turn_that_cannot_be_rendered_is_passed_over() -> None:
    ahead = ReadingAhead()
    ahead.add("a", turn("unrenderable"))
    assert read_next(ahead) == []


def test_reply_that_was_continued_is_one_message_of_the_next_turn() -> None:
    question = Message("user", "2 + 2?")
    begun = Message("assistant", "It ", thinking="so")
    turn = begin_turn([question, begun], GenerateOptions(continue_final=True))
    turn.reply = ReplySoFar(answer="is 4 ")
    assert turn.messages == [question]
    assert turn.next_replies() == [Message("assistant", "It is 4", thinking="so")]
    turn = begin_turn([question], GenerateOptions())
    turn.reply = ReplySoFar(answer="4")
    assert (turn.messages, turn.next_replies()) == ([question], [Message("assistant", "4")])
