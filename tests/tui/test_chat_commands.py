"""What a person does beside asking: stop, hurry, turn the dial, start over, copy."""

from __future__ import annotations

import asyncio

import pytest
from textual.command import CommandPalette

from nanorun.model.chat import Finished, GenerateOptions, PrefillProgress, TextDelta, ThinkingDelta
from nanorun.model.think import HIGH, LEVELS, LOW, MAX, MEDIUM, OFF, Think
from nanorun.tui.commands import COMMANDS, Command
from nanorun.tui.screens.chat import ChatScreen
from tests.support.fakes import FakeClient, Step, reply
from tests.tui.harness import SlowLoadingClient, chatting


def endless(*events: Step) -> list[Step]:
    """A reply that begins and goes on until it is stopped."""
    return [PrefillProgress(5, 5, 0), *events, asyncio.Event()]


async def test_escape_stops_an_answer_and_keeps_it() -> None:
    client = FakeClient.playing(endless(TextDelta("half of")), reply("two"))
    async with chatting(client) as chat:
        await chat.send("first")
        await chat.until(lambda: chat.state == "answering")
        await chat.pilot.press("escape")
        await chat.settle()
        assert client.last.generation.was_cancelled
        assert "stopped" in chat.text
        assert chat.history == [("user", "first"), ("assistant", "half of")]
        await chat.ask("second")
        assert chat.history[-1] == ("assistant", "two")


async def test_escape_during_thinking_gives_the_question_back() -> None:
    client = FakeClient.playing(endless(ThinkingDelta("hm")), reply("yes"))
    async with chatting(client) as chat:
        await chat.send("first")
        await chat.until(lambda: chat.state == "thinking")
        await chat.pilot.press("escape")
        await chat.settle()
        assert chat.history == []
        assert chat.screen.composer.text == "first"
        await chat.pilot.press("enter")
        await chat.settle()
        assert chat.history == [("user", "first"), ("assistant", "yes")]


async def test_given_back_question_is_replaced_by_typing() -> None:
    async with chatting(FakeClient.playing(endless(ThinkingDelta("hm")))) as chat:
        await chat.send("first")
        await chat.until(lambda: chat.state == "thinking")
        await chat.pilot.press("escape")
        await chat.settle()
        await chat.pilot.press("n", "o")
        assert chat.screen.composer.text == "no"


async def test_given_back_question_leaves_a_draft_alone() -> None:
    async with chatting(FakeClient.playing(endless(ThinkingDelta("hm")))) as chat:
        await chat.send("first")
        await chat.until(lambda: chat.state == "thinking")
        await chat.type("draft")
        await chat.pilot.press("escape")
        await chat.settle()
        assert chat.screen.composer.text == "draft"


async def test_second_escape_does_not_wait_for_the_engine() -> None:
    client = FakeClient.playing(endless(TextDelta("half")))
    async with chatting(client) as chat:

        async def deaf() -> None:
            """An engine too busy to stop."""

        await chat.send("first")
        await chat.until(lambda: chat.state == "answering")
        client.last.generation.cancel = deaf  # type: ignore[method-assign]
        await chat.pilot.press("escape")
        await chat.until(lambda: chat.state == "stopping")
        assert chat.screen.turn is not None
        await chat.pilot.press("escape")
        await chat.settle()
        assert client.last.generation.was_abandoned
        assert chat.history == [("user", "first"), ("assistant", "half")]


async def test_escape_before_anything_came_abandons_the_question() -> None:
    client = FakeClient.playing([asyncio.Event()])
    async with chatting(client) as chat:
        await chat.send("first")
        await chat.until(lambda: chat.state == "waiting")
        await chat.pilot.press("escape")
        await chat.settle()
        assert client.last.generation.was_abandoned
        assert chat.state == "ready"
        assert chat.screen.composer.text == "first"


async def test_escape_while_loading_takes_the_question_back() -> None:
    client = SlowLoadingClient()
    async with chatting(client) as chat:
        await chat.send("first")
        await chat.pilot.press("escape")
        await chat.until(lambda: chat.screen.turn is None)
        assert chat.state.startswith("loading the model")
        client.loaded.set()
        await chat.settle()
        assert client.requests == []
        assert chat.screen.composer.text == "first"
        assert chat.state == "ready"


async def test_ctrl_c_stops_first_and_then_says_how_to_quit() -> None:
    client = FakeClient.playing(endless(TextDelta("half")))
    async with chatting(client) as chat:
        await chat.send("first")
        await chat.until(lambda: chat.state == "answering")
        await chat.pilot.press("ctrl+c")
        await chat.settle()
        assert client.last.generation.was_cancelled
        assert chat.notes == []
        await chat.pilot.press("ctrl+c")
        assert "ctrl+q" in chat.notes[0]


async def test_answer_now_ends_the_thinking() -> None:
    gate = asyncio.Event()
    script: list[Step] = [
        ThinkingDelta("hm "),
        gate,
        ThinkingDelta("more"),
        TextDelta("yes"),
        Finished("stop"),
    ]
    client = FakeClient.playing(script)
    async with chatting(client) as chat:
        await chat.send("first")
        await chat.until(lambda: chat.state == "thinking")
        await chat.pilot.press("ctrl+g")
        gate.set()
        await chat.settle()
        assert client.last.generation.was_hurried
        assert (chat.turn.reply.thinking, chat.turn.reply.answer) == ("hm ", "yes")


async def test_keys_are_offered_while_they_work() -> None:
    gate = asyncio.Event()
    client = FakeClient.playing(
        [PrefillProgress(5, 5, 0), ThinkingDelta("hm"), gate, *endless(TextDelta("half"))]
    )
    async with chatting(client) as chat:
        assert "Stop" not in chat.text
        await chat.send("first")
        await chat.until(lambda: chat.state == "thinking")
        await chat.until(lambda: "Stop" in chat.text and "Answer now" in chat.text)
        gate.set()
        await chat.until(lambda: chat.state == "answering")
        await chat.until(lambda: "Stop" in chat.text and "Answer now" not in chat.text)


async def test_dial_goes_round_its_levels() -> None:
    client = FakeClient()
    async with chatting(client, options=GenerateOptions(think=MEDIUM)) as chat:
        seen = []
        for _ in LEVELS:
            await chat.pilot.press("ctrl+r")
            seen.append(chat.screen.status.think.level)
        assert seen == ["high", "max", "off", "low", "medium"]
        await chat.pilot.press("ctrl+r")
        await chat.ask("hi")
        assert client.last.options.think == HIGH


async def test_dial_leaves_a_budget_for_its_first_level() -> None:
    client = FakeClient()
    async with chatting(client, options=GenerateOptions(think=Think(1000))) as chat:
        await chat.ask("hi")
        assert client.last.options.think == Think(1000)
        await chat.pilot.press("ctrl+r")
        assert chat.screen.think == OFF


async def test_dial_holds_a_running_reply_to_the_new_level() -> None:
    client = FakeClient.playing(endless(ThinkingDelta("hm")))
    async with chatting(client, options=GenerateOptions(think=MEDIUM)) as chat:
        await chat.send("hi")
        await chat.until(lambda: chat.state == "thinking")
        await chat.pilot.press("ctrl+r", "ctrl+r")
        assert client.last.generation.budgets == [HIGH.budget, None]


async def test_dial_turns_by_click() -> None:
    async with chatting(FakeClient(), options=GenerateOptions(think=LOW)) as chat:
        status = chat.screen.status
        column = str(status.render()).index("reasoning") + 1
        await chat.pilot.click(status, offset=(column + 1, 0))
        assert chat.screen.think == MEDIUM


async def test_new_conversation_starts_with_an_empty_context() -> None:
    client = FakeClient.playing(reply("one"), reply("two"))
    async with chatting(client) as chat:
        await chat.ask("first")
        await chat.pilot.press("ctrl+n")
        await chat.pilot.pause()
        assert "first" not in chat.text
        assert "Ask something." in chat.text
        assert chat.screen.status.n_used == 0
        await chat.ask("second")
        assert [message.content for message in client.last.messages] == ["second"]


async def test_new_conversation_while_an_answer_streams() -> None:
    client = FakeClient.playing(endless(TextDelta("half")), reply("two"))
    async with chatting(client) as chat:
        await chat.send("first")
        await chat.until(lambda: chat.state == "answering")
        await chat.pilot.press("ctrl+n")
        await chat.settle()
        assert client.requests[0].generation.was_abandoned
        assert (chat.history, chat.state) == ([], "ready")
        assert chat.screen.composer.text == ""
        await chat.ask("second")
        assert chat.history == [("user", "second"), ("assistant", "two")]
        assert len(chat.screen.transcript.turns) == 1


async def test_new_conversation_keeps_the_draft() -> None:
    async with chatting(FakeClient()) as chat:
        await chat.ask("first")
        await chat.type("draft")
        await chat.pilot.press("ctrl+n")
        await chat.pilot.pause()
        assert chat.screen.composer.text == "draft"


async def test_copy_takes_the_markdown_of_the_last_answer() -> None:
    client = FakeClient.playing(reply("**one**"), reply("`two`", thinking="hm"))
    async with chatting(client) as chat:
        await chat.pilot.press("ctrl+o")
        assert chat.notes.pop() == "there is no answer to copy yet"
        await chat.ask("first")
        await chat.ask("second")
        await chat.pilot.press("ctrl+o")
        assert chat.app.clipboard == "`two`"
        assert chat.notes == ["copied 5 characters"]


async def test_palette_lists_the_commands_that_apply() -> None:
    async with chatting(FakeClient()) as chat:
        titles = {command.title for command in chat.app.get_system_commands(chat.screen)}
        assert {"New conversation", "Copy the last answer", "Reasoning: max", "Quit"} <= titles
        assert "Stop" not in titles


async def test_palette_runs_a_command() -> None:
    async with chatting(FakeClient()) as chat:
        await chat.pilot.press("ctrl+p")
        await chat.until(lambda: isinstance(chat.app.screen, CommandPalette))
        await chat.pilot.press(*"reasoning: max")
        await chat.until(lambda: "Set the dial to max" in chat.text)
        await chat.pilot.press("down", "enter")
        await chat.until(lambda: not isinstance(chat.app.screen, CommandPalette))
        await chat.until(lambda: chat.screen.think == MAX)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.action)
def test_every_command_has_its_action(command: Command) -> None:
    assert hasattr(ChatScreen, f"action_{command.action.partition('(')[0]}")
