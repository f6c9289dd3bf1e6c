from __future__ import annotations

import asyncio

import pytest

from nanorun.model.chat import Finished, TextDelta
from tests.support.fakes import FakeClient, Step, reply
from tests.tui.harness import Chat, chatting

CODE = "```python\n" + "".join(f"value_{i} = {i}  # [red]\n" for i in range(150)) + "```\n"
LONG = "\n\n".join(f"Paragraph {i}." for i in range(60))


def in_two_parts(gate: asyncio.Event) -> list[Step]:
    return [TextDelta(LONG), gate, TextDelta("\n\nThe end."), Finished("stop")]


async def begun(chat: Chat) -> None:
    """A long answer is half there, and followed."""
    await chat.send("go on")
    await chat.until(lambda: "Paragraph 59." in chat.text)


async def test_transcript_follows_its_end() -> None:
    gate = asyncio.Event()
    async with chatting(FakeClient.playing(in_two_parts(gate))) as chat:
        await begun(chat)
        gate.set()
        await chat.settle()
        assert "The end." in chat.text


async def test_transcript_stays_where_the_person_reads() -> None:
    gate = asyncio.Event()
    async with chatting(FakeClient.playing(in_two_parts(gate))) as chat:
        await begun(chat)
        await chat.pilot.press("pageup", "pageup")
        before = chat.screen.transcript.scroll_y
        gate.set()
        await chat.settle()
        assert chat.screen.transcript.scroll_y == before
        assert "The end." not in chat.text


@pytest.mark.parametrize("key", ["ctrl+end", "pagedown"])
async def test_transcript_follows_again_from_its_end(key: str) -> None:
    gate = asyncio.Event()
    async with chatting(FakeClient.playing(in_two_parts(gate))) as chat:
        await begun(chat)
        await chat.pilot.press("pageup", key)
        gate.set()
        await chat.settle()
        assert "The end." in chat.text


async def test_transcript_goes_to_a_new_question() -> None:
    async with chatting(FakeClient.playing(reply(LONG), reply("short"))) as chat:
        await chat.ask("first")
        await chat.pilot.press("pageup")
        await chat.ask("second")
        assert "short" in chat.text


async def test_transcript_of_a_short_conversation_starts_at_the_top() -> None:
    async with chatting(FakeClient.playing(reply("hello"))) as chat:
        await chat.ask("hi")
        assert chat.text.splitlines()[1].endswith(" hi")


async def test_transcript_shows_long_code() -> None:
    pieces = [CODE[i : i + 5] for i in range(0, len(CODE), 5)]
    script: list[Step] = [*(TextDelta(piece) for piece in pieces), Finished("stop")]
    async with chatting(FakeClient.playing(script), size=(80, 200)) as chat:
        await chat.ask("code")
        shown = [line.strip() for line in chat.text.splitlines() if "value_" in line]
        assert shown == [f"value_{i} = {i}  # [red]" for i in range(150)]


async def test_transcript_survives_resizes_while_it_streams() -> None:
    gate = asyncio.Event()
    async with chatting(FakeClient.playing(in_two_parts(gate))) as chat:
        await begun(chat)
        for size in ((30, 10), (12, 5), (160, 50), (80, 24)):
            await chat.pilot.resize_terminal(*size)
            await chat.pilot.pause()
        assert "Paragraph 59." in chat.text
        gate.set()
        await chat.settle()
        assert "The end." in chat.text


async def test_transcript_lays_out_only_turns_near_the_screen() -> None:
    async with chatting(FakeClient.playing(reply(LONG))) as chat:
        for i in range(6):
            await chat.ask(f"question {i}")
        turns = chat.screen.transcript.turns
        await chat.until(lambda: not any(turn.answer.display for turn in turns[:4]))
        assert turns[-1].answer.display
        height = chat.screen.transcript.max_scroll_y
        chat.screen.transcript.scroll_to(y=0, animate=False)
        await chat.until(lambda: "question 0" in chat.text and "Paragraph 0." in chat.text)
        assert chat.screen.transcript.max_scroll_y == height
        await chat.until(lambda: not turns[-1].answer.display)


async def test_transcript_measures_turns_anew_at_another_width() -> None:
    words = "word " * 400
    async with chatting(FakeClient.playing(reply(words)), size=(100, 20)) as chat:
        for _ in range(5):
            await chat.ask("again")
        first, *_, last = chat.screen.transcript.turns
        height = first.height_rows
        await chat.pilot.resize_terminal(40, 20)
        await chat.until(lambda: first.height_rows > height and not first.answer.display)
        assert first.height_rows == last.height_rows
