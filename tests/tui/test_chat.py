"""Asking and being answered."""

from __future__ import annotations

import asyncio

from nanorun.model.chat import (
    Finished,
    Notice,
    PrefillProgress,
    TextDelta,
    ThinkingDelta,
    Timings,
    ToolCall,
    Usage,
)
from nanorun.tui.widgets.thinking import Thinking
from tests.support.fakes import FakeClient, Step, reply
from tests.tui.harness import SlowLoadingClient, chatting


async def test_chat_shows_the_model_and_takes_a_question() -> None:
    async with chatting(FakeClient()) as chat:
        assert "3.6M parameters · q8_0 · 7.0 MiB · 8,192 tokens of context" in chat.text
        assert chat.state == "ready"
        assert chat.screen.focused is chat.screen.composer


async def test_chat_shows_memory_once_the_model_is_loaded() -> None:
    client = SlowLoadingClient()

    def memory() -> str | None:
        return "2.0 GiB planned, 1.9 GiB resident" if client.loaded.is_set() else None

    async with chatting(client, memory=memory) as chat:
        assert "memory:" not in chat.text
        client.loaded.set()
        await chat.until(lambda: chat.state == "ready")
        await chat.until(lambda: "memory: 2.0 GiB planned, 1.9 GiB resident" in chat.text)


async def test_chat_calls_the_model_as_it_was_asked_to() -> None:
    async with chatting(FakeClient(), model_name="my[bold]model") as chat:
        assert "my[bold]model  ready" in chat.text


async def test_chat_shows_question_thinking_and_answer() -> None:
    client = FakeClient.playing(reply("It is **5482**.", thinking="5 + 7 = 12"))
    async with chatting(client) as chat:
        turn = await chat.ask("What is 4785 + 697?")
        assert "What is 4785 + 697?" in chat.text
        assert "It is 5482." in chat.text
        assert "▸ thought for" in chat.text
        assert "5 + 7 = 12" not in chat.text
        await chat.pilot.press("ctrl+t")
        assert turn.thinking.is_open
        assert "5 + 7 = 12" in chat.text
        assert "8 tokens · 0.3 s · 50.0 t/s" in chat.text
        assert chat.screen.status.n_used == 15


async def test_chat_without_thinking_has_no_thinking_line() -> None:
    async with chatting(FakeClient.playing(reply("hello"))) as chat:
        await chat.ask("hi")
        assert not chat.turn.query_one(Thinking).display
        await chat.pilot.press("ctrl+t")
        assert "thought" not in chat.text


async def test_chat_sends_the_conversation_with_its_thinking() -> None:
    client = FakeClient.playing(reply("one", thinking="hm"), reply("two"))
    async with chatting(client) as chat:
        await chat.ask("first")
        await chat.ask("second")
        assert [(m.role, m.content, m.thinking) for m in client.last.messages] == [
            ("user", "first", None),
            ("assistant", "one", "hm"),
            ("user", "second", None),
        ]
        assert chat.history[-1] == ("assistant", "two")


async def test_chat_shows_an_answer_while_it_comes() -> None:
    gate = asyncio.Event()
    script: list[Step] = [
        PrefillProgress(9, 9, 0),
        ThinkingDelta("so"),
        gate,
        TextDelta("done"),
        Finished("stop"),
    ]
    async with chatting(FakeClient.playing(script)) as chat:
        await chat.send("hi")
        await chat.until(lambda: "▸ thinking…" in chat.text)
        assert chat.state == "thinking"
        gate.set()
        await chat.settle()
        assert "▸ thought for" in chat.text
        assert chat.state == "ready"


async def test_chat_says_how_far_the_prompt_is_read() -> None:
    gate = asyncio.Event()
    script: list[Step] = [PrefillProgress(3, 9, 0), gate, TextDelta("done"), Finished("stop")]
    async with chatting(FakeClient.playing(script)) as chat:
        await chat.send("hi")
        await chat.until(lambda: "reading 3 of 9 tokens" in chat.text)
        assert chat.screen.status.n_used == 3
        gate.set()
        await chat.settle()
        assert "reading" not in chat.text


async def test_chat_joins_many_short_fragments() -> None:
    text = "\n\n".join(f"Paragraph {i} has some words." for i in range(200))
    pieces = [text[i : i + 2] for i in range(0, len(text), 2)]
    script: list[Step] = [*(TextDelta(piece) for piece in pieces), Finished("stop")]
    async with chatting(FakeClient.playing(script)) as chat:
        turn = await chat.ask("go on")
        assert turn.answer.source == text
        assert chat.history[-1] == ("assistant", text)
        assert "Paragraph 199 has some words." in chat.text
        assert len(turn.answer.children) == 200


async def test_chat_answers_keys_while_tokens_stream() -> None:
    typed = asyncio.Event()
    script: list[Step] = [*(TextDelta(f"word{i} ") for i in range(2000)), typed, Finished("stop")]
    async with chatting(FakeClient.playing(script)) as chat:
        await chat.send("go on")
        await chat.pilot.press(*"next")
        assert chat.screen.composer.text == "next"
        assert chat.screen.turn is not None
        typed.set()
        await chat.settle()
        assert chat.screen.composer.text == "next"


async def test_chat_shows_markup_characters_as_they_are() -> None:
    client = FakeClient.playing(reply("a [red]b[/red] [/] [@click=x]c", thinking="[bold]hm"))
    async with chatting(client) as chat:
        await chat.ask("what is [red] in [/nothing]?")
        await chat.pilot.press("ctrl+t")
        assert "what is [red] in [/nothing]?" in chat.text
        assert "a [red]b[/red] [/] [@click=x]c" in chat.text
        assert "[bold]hm" in chat.text


async def test_chat_shows_notices_and_tool_calls() -> None:
    call = ToolCall("1", "add", {"a": 1, "b": "[x]"})
    script: list[Step] = [Notice("restarted with n_ctx [4096]"), *reply("done", tool_calls=[call])]
    async with chatting(FakeClient.playing(script)) as chat:
        await chat.ask("hi")
        assert "· restarted with n_ctx [4096]" in chat.text
        assert "· called add(a=1, b='[x]')" in chat.text
        assert chat.screen.messages[-1].tool_calls == (call,)


async def test_chat_says_when_the_context_is_full() -> None:
    usage = Usage(prompt_tokens=8000, completion_tokens=192)
    script: list[Step] = [
        TextDelta("and then"),
        Finished("length", usage, Timings(decode_s=1.0, decode_tps=50)),
    ]
    async with chatting(FakeClient.playing(script)) as chat:
        await chat.ask("go on")
        assert "cut off: the context is full" in chat.text
        assert "8,192 / 8,192" in chat.text
        assert chat.history == [("user", "go on"), ("assistant", "and then")]


async def test_chat_can_be_written_in_while_the_model_loads() -> None:
    client = SlowLoadingClient(scripts=[reply("hello")])
    async with chatting(client) as chat:
        assert chat.state.startswith("loading the model")
        await chat.send("hi")
        assert "will be sent when the model is loaded" in chat.text
        assert client.requests == []
        client.loaded.set()
        await chat.settle()
        assert chat.history == [("user", "hi"), ("assistant", "hello")]
        assert "will be sent" not in chat.text
        assert client.n_starts == 1


async def test_chat_keeps_a_question_asked_during_another() -> None:
    gate = asyncio.Event()
    client = FakeClient.playing([TextDelta("one"), gate, Finished("stop")], reply("two"))
    async with chatting(client) as chat:
        await chat.send("first")
        await chat.send("second")
        assert chat.screen.composer.text == "second"
        assert chat.notes == ["the last question is still being answered: Escape stops it"]
        gate.set()
        await chat.settle()
        await chat.pilot.press("enter")
        await chat.settle()
        assert [content for _, content in chat.history] == ["first", "one", "second", "two"]


async def test_chat_closes_the_client_with_itself() -> None:
    gate = asyncio.Event()
    client = FakeClient.playing([TextDelta("one "), gate, Finished("stop")])
    async with chatting(client) as chat:
        await chat.send("hi")
        await chat.pilot.press("ctrl+q")
    assert client.n_closes == 1
    assert client.last.generation.was_abandoned
    assert chat.app.return_code == 0
