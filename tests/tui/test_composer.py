from __future__ import annotations

from tests.fakes import FakeClient
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
