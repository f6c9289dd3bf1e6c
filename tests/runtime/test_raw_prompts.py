"""Prompts that no template makes, and their replies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nanorun.errors import ContextFull, UsageError
from nanorun.model.chat import (
    Event,
    Finished,
    GenerateOptions,
    Message,
    Prompt,
    RawPrompt,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
)
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import OFF, Think
from nanorun.runtime.client import EngineClient

QUESTION = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nWhat is 4785 + 697?<|im_end|>\n"
THINKING = QUESTION + "<|im_start|>assistant\n<think>\n"
ANSWERING = QUESTION + "<|im_start|>assistant\n<think></think>"
SUM = [Message("user", "What is 4785 + 697?")]
GREEDY = GenerateOptions(temperature=0.0, max_tokens=400)


@pytest.fixture
async def client(pico_gguf: Path) -> AsyncIterator[EngineClient]:
    client = EngineClient(pico_gguf, EngineOptions(n_ctx=2048, n_threads=1))
    yield client
    await client.close()


async def ask(
    client: EngineClient, prompt: Prompt, options: GenerateOptions = GREEDY
) -> tuple[str, str, Finished]:
    events: list[Event] = [event async for event in client.generate(prompt, options)]
    assert not any(isinstance(event, ToolCallDelta) for event in events)
    thinking = "".join(event.text for event in events if isinstance(event, ThinkingDelta))
    answer = "".join(event.text for event in events if isinstance(event, TextDelta))
    finished = events[-1]
    assert isinstance(finished, Finished)
    return thinking, answer, finished


async def test_rendered_chat_is_answered_as_the_chat_is(client: EngineClient) -> None:
    thinking, answer, of_chat = await ask(client, SUM)
    for prompt in (
        RawPrompt(THINKING),
        RawPrompt(tokens=tuple(await client.tokenize(THINKING, special=True))),
    ):
        raw_thinking, raw_answer, finished = await ask(client, prompt)
        assert (raw_thinking, raw_answer) == (thinking, answer) == (thinking, "5482")
        assert finished.usage.prompt_tokens == of_chat.usage.prompt_tokens
        assert finished.usage.thinking_tokens == of_chat.usage.thinking_tokens > 10


async def test_thinking_is_held_to_its_budget(client: EngineClient) -> None:
    for think, n_most in ((Think(4), 36), (OFF, 0)):
        options = GenerateOptions(temperature=0.0, think=think)
        _, answer, finished = await ask(client, RawPrompt(THINKING), options)
        assert answer and finished.usage.thinking_tokens <= n_most


async def test_text_without_thinking_is_all_of_what_the_model_says(client: EngineClient) -> None:
    options = GenerateOptions(temperature=0.0, max_tokens=60, ignore_eos=True)
    thinking, text, finished = await ask(client, RawPrompt(QUESTION + "<|im_start|>"), options)
    assert thinking == ""
    assert "</think>\n" in text and "<|im_end|>" in text  # tags are text, line breaks stay
    assert finished.usage.completion_tokens == 60
    # What was said is what comes of its tokens: nothing is trimmed or taken for markup.
    rest = await client.tokenize(text, special=True)
    assert len(rest) == 60


async def test_control_tokens_are_text_if_the_prompt_says_so(client: EngineClient) -> None:
    plain = RawPrompt(ANSWERING, special=False)
    _, _, finished = await ask(client, plain, GenerateOptions(max_tokens=1))
    assert finished.usage.prompt_tokens == len(await client.tokenize(ANSWERING))
    typed = RawPrompt(THINKING, special=False)
    thinking, _, _ = await ask(client, typed, GenerateOptions(temperature=0, max_tokens=5))
    assert thinking == ""  # what only spells `<think>` opens nothing


async def test_bos_comes_first_once(client: EngineClient) -> None:
    n_tokens = len(await client.tokenize("What is 1?"))
    counts = []
    for prompt in (
        RawPrompt("What is 1?"),
        RawPrompt("What is 1?", add_bos=True),
        RawPrompt("<s>What is 1?", add_bos=True),
    ):
        _, _, finished = await ask(client, prompt, GenerateOptions(max_tokens=1))
        counts.append(finished.usage.prompt_tokens - n_tokens)
    assert counts == [0, 1, 1]  # pico's file asks for none


async def test_same_prompt_again_costs_its_last_token(client: EngineClient) -> None:
    prompt = RawPrompt("1 + 2 = 3, 10 + 20 = 30, " * 20)
    options = GenerateOptions(temperature=0.0, max_tokens=4)
    first, second = [await ask(client, prompt, options) for _ in range(2)]
    assert first[1] == second[1]
    usage = second[2].usage
    assert usage.prompt_tokens - usage.cached_tokens == 1


async def test_raw_turns_reuse_what_was_read(client: EngineClient) -> None:
    _, answer, _ = await ask(client, RawPrompt(ANSWERING))
    turn = "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n<think></think>"
    longer = RawPrompt(f"{ANSWERING}{answer}<|im_end|>\n{turn}")
    _, _, finished = await ask(client, longer)
    n_new = len(await client.tokenize(f"<|im_end|>\n{turn}", special=True))
    assert finished.usage.prompt_tokens - finished.usage.cached_tokens <= n_new + 1


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (RawPrompt(""), "the prompt is empty"),
        (RawPrompt(tokens=()), "the prompt is empty"),
        (RawPrompt(tokens=(5, 1024, 2000)), "token 1024 at place 1 is none"),
        (RawPrompt(tokens=(5, 6, -1)), "token -1 at place 2 is none"),
        (RawPrompt(tokens=(2**40,)), "at place 0"),
    ],
)
async def test_prompt_that_is_none_is_refused(
    client: EngineClient, prompt: RawPrompt, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        await ask(client, prompt)
    assert (await ask(client, SUM))[1] == "5482"


async def test_tools_cannot_be_offered(client: EngineClient) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with pytest.raises(UsageError, match="cannot offer tools"):
        await ask(client, RawPrompt(ANSWERING), GenerateOptions(tools=(tool,)))


async def test_prompt_too_long_is_refused_beside_the_engine(client: EngineClient) -> None:
    with pytest.raises(ContextFull, match="the context holds 2048"):
        await ask(client, RawPrompt("1 + 1 " * 50_000))
    with pytest.raises(ContextFull, match="20000 tokens"):
        await ask(client, RawPrompt(tokens=(40,) * 20_000))


def test_raw_prompt_is_a_text_or_tokens() -> None:
    for fields in ({}, {"text": "a", "tokens": (1,)}):
        with pytest.raises(ValueError, match="either a text or tokens"):
            RawPrompt(**fields)  # type: ignore[arg-type]
