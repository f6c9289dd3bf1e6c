from __future__ import annotations

import pytest
from textual.app import App, ComposeResult

from nanorun.model.think import HIGH, Think
from nanorun.tui.widgets.status_bar import StatusBar


class OneBar(App[None]):
    def compose(self) -> ComposeResult:
        yield StatusBar()


async def bar_text(width: int, **values: object) -> str:
    app = OneBar()
    async with app.run_test(size=(width, 3)) as pilot:
        bar = app.query_one(StatusBar)
        for name, value in values.items():
            setattr(bar, name, value)
        await pilot.pause()
        return str(bar.render())


BUSY = {"model": "pico", "state": "thinking", "n_used": 2048, "n_ctx": 8192, "tps": 38.14}


async def test_status_bar_shows_all_it_knows() -> None:
    text = await bar_text(100, **BUSY, think=HIGH)
    left, right = text.split("reasoning", 1)
    assert left.split() == ["pico", "thinking"]
    assert right.split() == ["▮▮▮▯", "high", "2,048", "/", "8,192", "━" * 10, "38.1", "t/s"]
    assert len(text) == 98


@pytest.mark.parametrize(
    ("width", "kept", "dropped"),
    [(66, "8,192", "t/s"), (45, "reasoning", "8,192"), (20, "thinking", "reasoning")],
)
async def test_status_bar_drops_what_does_not_fit(width: int, kept: str, dropped: str) -> None:
    text = await bar_text(width, **BUSY)
    assert kept in text
    assert dropped not in text


async def test_status_bar_shows_a_budget_in_tokens() -> None:
    assert "reasoning 1,000 tokens" in await bar_text(100, **BUSY, think=Think(1000))


async def test_status_bar_shows_brackets_in_names() -> None:
    assert "my[red]model" in await bar_text(100, model="my[red]model")


@pytest.mark.parametrize(("n_used", "n_lit"), [(0, 0), (1, 1), (4096, 5), (8192, 10), (9999, 10)])
async def test_status_bar_meter_lights_what_is_used(n_used: int, n_lit: int) -> None:
    app = OneBar()
    async with app.run_test(size=(100, 3)) as pilot:
        bar = app.query_one(StatusBar)
        bar.n_ctx, bar.n_used = 8192, n_used
        await pilot.pause()
        content = bar.render()
        dark = [span for span in content.spans if span.style == "$surface-lighten-3"]
    assert sum(span.end - span.start for span in dark) == 10 - n_lit
