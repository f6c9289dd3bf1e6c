"""What goes wrong is said in the transcript, and the next question works."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, NoReturn

import pytest

from nanorun.errors import ContextFull, EngineDied, MemoryPlanError, ModelError, UsageError
from nanorun.model.chat import Finished, PrefillProgress, TextDelta, ThinkingDelta
from nanorun.tui.widgets.notice import ErrorPanel
from tests.support.fakes import FakeClient, Step, reply
from tests.tui.harness import SlowLoadingClient, chatting

DEATH = EngineDied("the engine's process was ended by SIGKILL", facts=["ggml [said] nothing"])


async def test_death_of_the_engine_is_shown_and_the_next_question_works() -> None:
    begun: list[Step] = [PrefillProgress(5, 5, 0), ThinkingDelta("hm"), TextDelta("half"), DEATH]
    client = FakeClient.playing(reply("one"), begun, reply("two"))
    async with chatting(client) as chat:
        await chat.ask("first")
        await chat.ask("second")
        assert "the engine's process was ended by SIGKILL" in chat.text
        assert "ggml [said] nothing" in chat.text
        assert chat.state == "engine restarts when asked"
        assert chat.screen.composer.text == "second"
        await chat.pilot.press("enter")
        await chat.settle()
        assert [message.content for message in client.last.messages] == ["first", "one", "second"]
        assert chat.history[-1] == ("assistant", "two")
        assert chat.state == "ready"


async def test_restart_of_the_engine_is_said_while_it_takes_place() -> None:
    gate = asyncio.Event()
    client = FakeClient.playing([DEATH], [gate, TextDelta("two"), Finished("stop")])
    async with chatting(client) as chat:
        await chat.ask("first")
        await chat.pilot.press("enter")
        await chat.until(lambda: chat.state == "restarting the engine")
        gate.set()
        await chat.settle()
        assert chat.state == "ready"


async def test_full_context_leaves_the_question_out() -> None:
    full = ContextFull(
        "the prompt has 9000 tokens, the context 8192", tries=["nanorun chat pico --n-ctx 16k"]
    )
    client = FakeClient.playing(reply("one"), [full], reply("two"))
    async with chatting(client) as chat:
        await chat.ask("first")
        await chat.ask("long")
        assert "the prompt has 9000 tokens" in chat.text
        assert "try: nanorun chat pico --n-ctx 16k" in chat.text
        assert chat.history == [("user", "first"), ("assistant", "one")]
        assert chat.state == "ready"


async def test_failed_load_shows_facts_and_tries() -> None:
    error = MemoryPlanError(
        "nano.gguf needs 24.1 GiB, but CUDA0 has 15.2 GiB free",
        facts=["weights 21.9 GiB", "KV cache 0.8 GiB"],
        tries=["nanorun chat nano.gguf --n-ctx 32768", "nanorun plan nano.gguf"],
    )
    async with chatting(FakeClient(start_error=error)) as chat:
        await chat.settle()
        assert chat.state == "not loaded"
        for line in (error.message, *error.facts, f"try: {error.tries[0]}", error.tries[1]):
            assert line in chat.text


async def test_failed_load_gives_the_waiting_question_back() -> None:
    client = SlowLoadingClient(start_error=ModelError("pico.gguf is no GGUF file"))
    async with chatting(client) as chat:
        await chat.send("first")
        client.loaded.set()
        await chat.settle()
        assert "pico.gguf is no GGUF file" in chat.text
        assert chat.screen.composer.text == "first"
        assert (chat.history, client.requests) == ([], [])
        assert len(chat.screen.query(ErrorPanel)) == 1


async def test_question_after_a_failed_load_tries_again() -> None:
    client = FakeClient.playing(reply("hello"), start_error=ModelError("no such file"))
    async with chatting(client) as chat:
        await chat.settle()
        client.start_error = None
        await chat.ask("hi")
        assert client.n_starts == 2
        assert chat.history == [("user", "hi"), ("assistant", "hello")]
        assert chat.state == "ready"


@pytest.mark.parametrize("where", ["load", "reply"])
async def test_bug_does_not_take_the_conversation_with_it(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    bug = KeyError("n_embd")
    client = FakeClient.playing([bug], start_error=bug if where == "load" else None)
    with caplog.at_level(logging.ERROR):
        async with chatting(client) as chat:
            await (chat.settle() if where == "load" else chat.ask("hi"))
            assert "internal error: KeyError: 'n_embd'" in chat.text
    assert "Traceback" in caplog.text


async def test_reply_without_an_end_is_taken_as_it_is() -> None:
    async with chatting(FakeClient.playing([TextDelta("half")])) as chat:
        await chat.ask("hi")
        assert chat.history == [("user", "hi"), ("assistant", "half")]
        assert chat.state == "ready"


async def test_refused_request_is_shown() -> None:
    class Refusing(FakeClient):
        def generate(self, *_: Any, **__: Any) -> NoReturn:
            raise UsageError("reasoning depth 'deep' is not known")

    async with chatting(Refusing()) as chat:
        await chat.ask("hi")
        assert "reasoning depth 'deep' is not known" in chat.text
        assert chat.state == "ready"
