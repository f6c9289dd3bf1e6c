from __future__ import annotations

import asyncio

from textual import events

from tests.support.fakes import FakeClient
from tests.tui.harness import chatting


async def test_composer_enter_sends_and_clears() -> None:
    client = FakeClient()
    async with chatting(client) as chat:
        await chat.ask("  hi there \n")
        assert chat.history[0] == ("user", "hi there")
        assert chat.screen.composer.text == ""


async def test_composer_starts_lines_with_other_enters() -> None:
    async with chatting(FakeClient()) as chat:
        height = chat.screen.composer.size.height
        await chat.pilot.press("a", "shift+enter", "b", "ctrl+j", "c", "alt+enter", "d")
        assert chat.screen.composer.text == "a\nb\nc\nd"
        assert chat.screen.composer.size.height == height + 3
        assert chat.history == []


async def test_composer_sends_nothing_when_empty() -> None:
    client = FakeClient()
    async with chatting(client) as chat:
        await chat.send(" \n ")
        assert client.requests == []
        assert chat.screen.turn is None


async def test_composer_keeps_the_order_of_keys_that_come_at_once() -> None:
    client = FakeClient()
    async with chatting(client) as chat:
        keys = [("a", "a"), ("ctrl+j", "\n"), ("b", "b"), ("enter", "\r"), ("c", "c")]
        for key, character in keys:
            chat.app.post_message(events.Key(key, character))
        await chat.until(lambda: client.requests)
        await chat.settle()
        assert chat.history[0] == ("user", "a\nb")
        assert chat.screen.composer.text == "c"


async def test_composer_takes_back_what_was_sent_too_early() -> None:
    client = FakeClient.playing([asyncio.Event()])
    async with chatting(client) as chat:
        for key in ("a", "enter", "b", "enter", "c"):
            chat.app.post_message(events.Key(key, key[0]))
        await chat.until(lambda: chat.screen.composer.text == "b\nc")
        assert chat.history == [("user", "a")]


async def test_composer_stays_small_beside_a_long_paste() -> None:
    async with chatting(FakeClient(), size=(60, 24)) as chat:
        await chat.type("\n".join(f"line {i}" for i in range(100)))
        assert chat.screen.composer.outer_size.height <= 12
        assert chat.screen.transcript.size.height >= 9


async def test_typing_elsewhere_goes_to_the_composer() -> None:
    async with chatting(FakeClient()) as chat:
        chat.screen.set_focus(None)
        await chat.pilot.press("h", "i")
        assert chat.screen.composer.text == "hi"
        assert chat.screen.focused is chat.screen.composer
