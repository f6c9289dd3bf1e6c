from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from textual.app import App, ComposeResult
from textual.pilot import Pilot
from textual.widgets import Static

from nanorun.tui.widgets.thinking import Thinking, ThinkingHeader


class OneThought(App[None]):
    def compose(self) -> ComposeResult:
        yield Thinking()


@pytest.fixture
async def pilot() -> AsyncIterator[Pilot[None]]:
    async with OneThought().run_test(size=(60, 30)) as pilot:
        yield pilot


@pytest.fixture
def thinking(pilot: Pilot[None]) -> Thinking:
    return pilot.app.query_one(Thinking)


def header(thinking: Thinking) -> str:
    return str(thinking.query_one(ThinkingHeader).render())


def pages(thinking: Thinking) -> list[str]:
    return [str(page.render()) for page in thinking.query(".pages > Static").results(Static)]


async def test_thinking_is_not_there_until_it_begins(thinking: Thinking) -> None:
    assert not thinking.display
    thinking.append_fragment("hm")
    assert thinking.display


async def test_thinking_header_times_it_and_shows_its_last_line(thinking: Thinking) -> None:
    thinking.append_fragment("units first\n5 + 7 = [12]\n")
    thinking.show_time(3.21, is_over=False)
    assert header(thinking) == "▸ thinking… 3.2 s  5 + 7 = [12]"
    thinking.show_time(4.0, is_over=True)
    assert header(thinking) == "▸ thought for 4.0 s"


async def test_thinking_unfolds_by_click_and_by_key(pilot: Pilot[None], thinking: Thinking) -> None:
    thinking.append_fragment("some [red]thoughts[/red]")
    thinking.show_time(1.0, is_over=True)
    await pilot.pause()
    assert pages(thinking) == []
    await pilot.click(ThinkingHeader)
    await pilot.pause()
    assert thinking.is_open
    assert header(thinking) == "▾ thought for 1.0 s"
    assert pages(thinking) == ["some [red]thoughts[/red]"]
    thinking.query_one(ThinkingHeader).focus()
    await pilot.press("enter")
    assert not thinking.is_open


async def test_thinking_in_many_fragments_loses_nothing(
    pilot: Pilot[None], thinking: Thinking
) -> None:
    lines = [f"step {i}: carry {i % 2}" for i in range(600)]
    thinking.append_fragment("before it was opened\n")
    thinking.is_open = True
    for line in lines:
        thinking.append_fragment(line[:3])
        thinking.append_fragment(line[3:] + "\n")
    await pilot.pause()
    assert len(pages(thinking)) > 3
    assert "\n".join(pages(thinking)).splitlines() == ["before it was opened", *lines]
