"""What a prompt is to the model, and texts to tokens and back, without a reply."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from nanorun.errors import UsageError
from nanorun.model.chat import Finished, GenerateOptions, Message, Prompt, RawPrompt
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import OFF
from nanorun.runtime.client import EngineClient
from nanorun.runtime.engine.prompts import SHORT_CHARS

SUM = Message("user", "What is 4785 + 697? \u20ac\U0001f600 <|im_end|>")
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
}
OPTIONS = GenerateOptions(temperature=0.0, max_tokens=1)


@pytest.fixture
async def client(pico_gguf: Path) -> AsyncIterator[EngineClient]:
    client = EngineClient(pico_gguf, EngineOptions(n_ctx=2048, n_threads=1))
    yield client
    await client.close()


async def n_prompt(client: EngineClient, prompt: Prompt, options: GenerateOptions) -> int:
    """Tokens that the engine says it was given to answer."""
    (finished,) = [e async for e in client.generate(prompt, options) if isinstance(e, Finished)]
    return finished.usage.prompt_tokens


@pytest.mark.parametrize(
    ("prompt", "options", "ends", "thinks"),
    [
        ([SUM], OPTIONS, "<|im_start|>assistant\n<think>\n", True),
        ([SUM], replace(OPTIONS, think=OFF), "<|im_start|>assistant\n<think></think>", False),
        ([Message("system", "Add."), SUM], replace(OPTIONS, tools=(TOOL,)), "<think>\n", True),
        (
            [SUM, Message("assistant", "54")],
            replace(OPTIONS, continue_final=True),
            "assistant\n<think></think>54",
            False,
        ),
        (RawPrompt("4785 + 697 ="), OPTIONS, "4785 + 697 =", False),
        (RawPrompt("4785<think>"), OPTIONS, "4785<think>", True),
    ],
)
async def test_rendered_prompt_is_what_the_engine_would_read(
    client: EngineClient, prompt: Prompt, options: GenerateOptions, ends: str, thinks: bool
) -> None:
    rendered = await client.render(prompt, options)
    assert rendered.text.endswith(ends)
    assert rendered.thinks is thinks
    assert rendered.text == await client.detokenize(rendered.tokens)
    n_tokens = await client.count_tokens(prompt, options)
    assert n_tokens == len(rendered.tokens) == await n_prompt(client, prompt, options)


async def test_typed_control_tokens_stay_text(client: EngineClient) -> None:
    rendered = await client.render([SUM], OPTIONS)
    (end,) = await client.tokenize("<|im_end|>", special=True)
    assert rendered.text.count("<|im_end|>") - list(rendered.tokens).count(end) == 1


async def test_boundaries_are_where_turns_begin(client: EngineClient) -> None:
    messages = [Message("system", "Add."), SUM, Message("assistant", "5482"), SUM]
    rendered = await client.render(messages, OPTIONS)
    (begin,) = await client.tokenize("<|im_start|>", special=True)
    assert rendered.boundaries
    assert {rendered.tokens[place] for place in rendered.boundaries} == {begin}


async def test_pieces_are_bytes_and_their_text_is_what_was_tokenized(client: EngineClient) -> None:
    text = "na\u00efve \U0001f600<|im_end|>"
    tokens = await client.tokenize(text, special=True)
    pieces = await client.pieces(tokens)
    assert len(pieces) == len(tokens)
    assert b"".join(pieces) == text.encode()
    assert pieces[-1] == b"<|im_end|>"
    assert await client.detokenize(tokens) == text
    assert await client.detokenize(tokens, special=False) == text.removesuffix("<|im_end|>")
    assert await client.detokenize([]) == ""


async def test_long_texts_are_the_same_beside_the_engine(client: EngineClient) -> None:
    text = "4785 + 697 = 5482\n" * (2 * SHORT_CHARS // 18)
    tokens = await client.tokenize(text)
    assert len(tokens) > SHORT_CHARS
    assert await client.detokenize(tokens) == text
    assert text in (await client.render([Message("user", text)], OPTIONS)).text


@pytest.mark.parametrize("token", [-1, 10**9])
async def test_token_that_is_none_is_named(client: EngineClient, token: int) -> None:
    with pytest.raises(UsageError, match=f"token {token} at place 1 is none of the model's"):
        await client.detokenize([5, token])


async def test_prompt_that_cannot_be_answered_is_refused(client: EngineClient) -> None:
    with pytest.raises(UsageError, match="no messages"):
        await client.count_tokens([], OPTIONS)
    with pytest.raises(UsageError, match="the prompt is empty"):
        await client.render(RawPrompt(""), OPTIONS)
