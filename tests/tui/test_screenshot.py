from __future__ import annotations

from scripts.screenshot import draw
from tests.support.fakes import FakeClient, reply


async def test_screenshot_shows_questions_thinking_and_answers() -> None:
    client = FakeClient.playing(reply("5482", thinking="carry[1]"), reply("425"))
    svg = await draw(client, "pico", ["What is 4785 + 697?", "And 58 + 367?"])
    text = svg.replace("&#160;", " ")
    for part in ("What is 4785 + 697?", "carry[1]", "5482", "And 58 + 367?", "425", "pico"):
        assert part in text
    assert client.last.options.temperature == 0.0
