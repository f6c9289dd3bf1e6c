"""What agents' long prompts cost the second time: their question, whatever happened meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from nanorun.model.chat import Finished, GenerateOptions, Message, ToolCall
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import OFF
from nanorun.runtime.client import EngineClient

OPTIONS = EngineOptions(n_ctx=4096, n_parallel=2, n_seq_spare=2, n_threads=1, read_ahead=False)
RULES = "Read before you write. Say what you did. Ask when in doubt. Keep what works. " * 15
TOOL = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Reads a file and returns its text, with line numbers.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    },
}
SHORT = GenerateOptions(think=OFF, max_tokens=4, ignore_eos=True, tools=(TOOL,))


def rules(i: int = 0) -> Message:
    return Message("system", f"These are the rules of agent {i}. {RULES}")


def folder(name: str) -> Message:
    """What Codex says of where it is, in a turn of its own."""
    lines = f"<cwd>/home/ann/{name}</cwd>\n<shell>bash</shell>\n<date>2026-11-30</date>\n"
    return Message("user", f"<environment_context>\n{lines * 3}</environment_context>")


def question(i: int) -> Message:
    return Message("user", f"What is {31 * i + 7} + {17 * i + 40}?")


class Agent:
    """Sessions with one engine, which may be started anew between them."""

    def __init__(self, model: Path, options: EngineOptions) -> None:
        self._model = model
        self._options = options
        self.client = EngineClient(model, options)

    async def restart(self) -> None:
        await self.client.close()
        self.client = EngineClient(self._model, self._options)

    async def read(self, *messages: Message) -> int:
        """Tokens that a reply to these messages costs before its first token."""
        finished = [
            event
            async for event in self.client.generate(list(messages), SHORT)
            if isinstance(event, Finished)
        ]
        usage = finished[0].usage
        return usage.prompt_tokens - usage.cached_tokens

    async def n_tokens(self, *messages: Message) -> int:
        """Tokens of the messages' texts."""
        return sum([len(await self.client.tokenize(m.content)) for m in messages])


@pytest.fixture
async def agent(pico_gguf: Path, tmp_path: Path) -> AsyncIterator[Agent]:
    agent = Agent(pico_gguf, replace(OPTIONS, state_dir=str(tmp_path)))
    yield agent
    await agent.client.close()


async def test_new_session_costs_its_question(agent: Agent) -> None:
    first = await agent.read(rules(), question(1))
    assert first > 900
    assert await agent.read(rules(), question(2)) <= await agent.n_tokens(question(2)) + 64


async def test_new_session_after_a_restart_costs_its_question(agent: Agent) -> None:
    await agent.read(rules(), question(1))
    await agent.restart()
    assert await agent.read(rules(), question(2)) <= await agent.n_tokens(question(2)) + 64


async def test_new_session_after_twenty_conversations_of_others_costs_its_question(
    pico_gguf: Path, tmp_path: Path
) -> None:
    """The disk holds not half of them, and the device and the host's memory two or three."""
    options = replace(OPTIONS, state_dir=str(tmp_path), archive_bytes=0, state_bytes=30 * 2**20)
    agent = Agent(pico_gguf, options)
    await agent.read(rules(), question(1))
    for i in range(20):
        text = f"Story {i}: " + f"once there were {i} birds in a tree. " * 60
        await agent.read(Message("user", text))
    n_most = await agent.n_tokens(question(2)) + 64
    assert await agent.read(rules(), question(2)) <= n_most
    await agent.restart()
    assert await agent.read(rules(), question(3)) <= n_most
    await agent.client.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 30 * 2**20


async def test_new_session_after_twenty_other_agents_costs_its_question(agent: Agent) -> None:
    for i in range(21):
        await agent.read(rules(i), question(i))
    assert await agent.read(rules(0), question(22)) <= await agent.n_tokens(question(22)) + 64
    await agent.restart()
    assert await agent.read(rules(1), question(23)) <= await agent.n_tokens(question(23)) + 64


async def test_what_stands_before_the_question_is_kept_with_the_rules(agent: Agent) -> None:
    """A folder is described in a turn of its own: the same costs nothing, another one itself."""
    await agent.read(rules(), folder("birds"), question(1))
    await agent.restart()
    n_question = await agent.n_tokens(question(2))
    assert await agent.read(rules(), folder("birds"), question(2)) <= n_question + 64
    other = folder("trees")
    n_other = await agent.n_tokens(other, question(3))
    assert await agent.read(rules(), other, question(3)) <= n_other + 64
    await agent.restart()
    assert await agent.read(rules(), folder("birds"), question(4)) <= n_question + 64
    assert await agent.read(rules(), other, question(5)) <= n_question + 64


async def test_what_two_questions_begin_with_is_not_read_a_third_time(agent: Agent) -> None:
    """Claude Code puts a reminder before the question, in the same turn."""
    reminder = "Remember: the sky is blue, water is wet and birds can fly. " * 15

    def asked(i: int) -> Message:
        return Message("user", f"{reminder}\n\n{question(i).content}")

    await agent.read(rules(), asked(1))
    assert await agent.read(rules(), asked(2)) <= await agent.n_tokens(asked(2)) + 64
    n_most = await agent.n_tokens(question(3)) + 64
    assert n_most < await agent.n_tokens(Message("user", reminder))
    assert await agent.read(rules(), asked(3)) <= n_most
    await agent.restart()
    assert await agent.read(rules(), asked(4)) <= n_most


async def test_turn_with_a_tools_result_costs_what_is_new(agent: Agent) -> None:
    messages = [rules(), question(1)]
    await agent.read(*messages)
    for i in range(4):
        call = ToolCall(f"call{i}", "read_file", {"path": f"birds/{i}.txt"})
        messages.append(Message("assistant", "", tool_calls=(call,)))
        result = Message("tool", f"{i}: birds can fly\n" * 20, tool_call_id=call.id)
        messages.append(result)
        call_text = f"<tool_call>\n<function={call.name}>\n<parameter=path>\nbirds/{i}.txt\n"
        call_text += (
            "</parameter>\n</function>\n</tool_call>\n<tool_response>\n\n</tool_response>\n"
        )
        turns = "<|im_start|>assistant\n<think></think><|im_end|>\n<|im_start|>user\n<|im_end|>\n"
        opening = "<|im_start|>assistant\n<think></think>"
        text = turns + call_text + result.content + opening
        n_new = len(await agent.client.tokenize(text, special=True))
        assert await agent.read(*messages) <= n_new + 16
