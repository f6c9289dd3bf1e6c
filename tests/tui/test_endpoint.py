"""The chat over an endpoint: named, and waited for when it goes away."""

from __future__ import annotations

from dataclasses import replace

from nanorun.errors import EngineDied
from tests.support.fakes import MODEL_INFO, FakeClient, reply
from tests.tui.harness import chatting

GONE = EngineDied("http://spark:8000/v1/chat/completions cannot be reached: connection refused")
REMOTE = replace(
    MODEL_INFO, name="nano", n_params=0, file_bytes=0, recipe=None, n_layer=0, device="spark:8000"
)


async def test_chat_shows_the_endpoint_it_talks_to() -> None:
    client = FakeClient.playing(reply("one"), model_info=REMOTE)
    async with chatting(client, endpoint="spark:8000") as chat:
        await chat.until(lambda: chat.state == "ready")
        assert chat.screen.status.model == "nano at spark:8000"
        assert "8,192 tokens of context · at spark:8000 · reached in" in chat.text
        assert "parameters" not in chat.text


async def test_chat_goes_on_when_the_endpoint_is_back() -> None:
    client = FakeClient.playing([GONE], reply("one"), model_info=REMOTE)
    async with chatting(client, endpoint="spark:8000") as chat:
        await chat.ask("first")
        assert "cannot be reached: connection refused" in chat.text
        assert chat.state == "endpoint is gone"
        assert chat.screen.composer.text == "first"
        await chat.pilot.press("enter")
        await chat.settle()
        assert chat.history == [("user", "first"), ("assistant", "one")]
        assert chat.state == "ready"


async def test_chat_reaches_an_endpoint_later_that_was_not_there_at_first() -> None:
    client = FakeClient.playing(reply("one"), model_info=REMOTE, start_error=GONE)
    async with chatting(client, endpoint="spark:8000") as chat:
        await chat.until(lambda: chat.state == "not reached")
        client.start_error = None
        await chat.ask("first")
        assert chat.history == [("user", "first"), ("assistant", "one")]
