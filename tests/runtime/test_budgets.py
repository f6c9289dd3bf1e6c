"""Budgets of thinking are kept, and an answer always follows."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nanorun.model.chat import Finished, GenerateOptions, Message, TextDelta, ThinkingDelta
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import MAX, Think, grace_tokens
from nanorun.runtime.client import EngineClient

QUESTIONS = ["What is {a} + {b}?", "{a} - {b}", "Hello", "Who are you?", "Reply in JSON: name fox"]


@pytest.fixture
async def client(pico_gguf: Path) -> AsyncIterator[EngineClient]:
    client = EngineClient(pico_gguf, EngineOptions(n_ctx=8192, n_parallel=8, n_threads=1))
    yield client
    await client.close()


async def reply(
    client: EngineClient, question: str, options: GenerateOptions, answer_now_after: int | None
) -> tuple[str, str, Finished, int]:
    """Thinking, answer, end, and how much was thought when "answer now" was said."""
    thinking, answer, said_at = "", "", -1
    generation = client.generate([Message("user", question)], options)
    async for event in generation:
        if isinstance(event, ThinkingDelta):
            thinking += event.text
            if answer_now_after is not None and said_at < 0 and len(thinking) >= answer_now_after:
                said_at = len(thinking)
                await generation.finish_thinking()
        elif isinstance(event, TextDelta):
            answer += event.text
        elif isinstance(event, Finished):
            return thinking, answer, event, said_at
    raise AssertionError("the reply did not finish")


async def check_budgets(client: EngineClient, n: int) -> None:
    rng = random.Random(4)

    async def one(seed: int) -> None:
        budget = rng.choice([1, 2, 3, 5, 8, 13, 21, 34, 60, 100])
        question = rng.choice(QUESTIONS).format(a=rng.randint(0, 9999), b=rng.randint(0, 999))
        # A hot temperature rambles on, past any budget.
        options = GenerateOptions(
            think=Think.parse(budget),
            temperature=rng.choice([0.0, 1.0, 3.0]),
            seed=seed,
            max_tokens=600,
        )
        thinking, answer, finished, _ = await reply(client, question, options, None)
        used = finished.usage.thinking_tokens
        assert used <= budget + grace_tokens(budget), (question, budget, used)
        assert answer.strip() or finished.reason == "tool_calls", (question, budget, thinking)
        assert "<think>" not in answer and "</think>" not in answer

    await asyncio.gather(*(one(seed) for seed in range(n)))


async def test_budgets_are_kept_and_an_answer_follows(client: EngineClient) -> None:
    await check_budgets(client, 40)


@pytest.mark.slow
async def test_two_hundred_budgets_are_kept(client: EngineClient) -> None:
    await check_budgets(client, 200)


async def test_thinking_that_was_ended_does_not_begin_anew(client: EngineClient) -> None:
    (opening,) = await client.tokenize("<think>", special=True)
    options = GenerateOptions(
        think=Think(5), temperature=0.0, max_tokens=600, logit_bias=((opening, 100.0),)
    )
    _, answer, finished, _ = await reply(client, "What is 47 + 86?", options, None)
    assert finished.usage.thinking_tokens <= 5 + grace_tokens(5)
    assert answer.strip()


async def test_thinking_leaves_room_for_an_answer_in_the_context(pico_gguf: Path) -> None:
    client = EngineClient(pico_gguf, EngineOptions(n_ctx=256, n_parallel=1, n_threads=1))
    try:
        # Without its closing tags and its end, a reply thinks for ever.
        ends = await client.tokenize("</think></s><|im_end|><tool_call>", special=True)
        options = GenerateOptions(
            think=MAX,
            temperature=0.0,
            logit_bias=tuple((token, -100.0) for token in ends),
        )
        thinking, answer, _, _ = await reply(client, "4785 + 697", options, None)
        assert thinking and answer.strip()
    finally:
        await client.close()


async def test_answer_now_ends_the_thinking_within_a_line_or_grace(client: EngineClient) -> None:
    # Banning `</think>` makes pico think for ever.
    (close,) = await client.tokenize("</think>", special=True)
    options = GenerateOptions(
        think=MAX, temperature=0.0, max_tokens=2000, logit_bias=((close, -100.0),)
    )
    for after in (1, 10, 40):
        thinking, answer, finished, said_at = await reply(client, "4785 + 697", options, after)
        assert said_at > 0
        n_more = len(await client.tokenize(thinking[said_at:]))
        # Some tokens were on their way when it was said.
        assert n_more <= 2 * grace_tokens(finished.usage.thinking_tokens)
        assert answer.strip()
