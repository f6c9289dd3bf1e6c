from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from nanorun.model.chat import RawPrompt, ThinkingDelta, TokenLogprobs
from nanorun.model.think import MEDIUM
from tests.server.conftest import Endpoint, Stream, error_of
from tests.support.fakes import reply

Make = Callable[..., Endpoint]


async def complete(api: Endpoint, prompt: Any = "once", **fields: Any) -> httpx.Response:
    body = {"model": "pico", "prompt": prompt, **fields}
    return await api.request("POST", "/v1/completions", json=body)


async def test_completion_is_the_text_that_follows(endpoint: Make) -> None:
    api = endpoint(reply(" upon a time"))
    body = (await complete(api, max_tokens=4, seed=3)).json()
    assert body["object"] == "text_completion"
    (choice,) = body["choices"]
    assert choice == {"index": 0, "text": " upon a time", "logprobs": None, "finish_reason": "stop"}
    assert body["usage"]["completion_tokens"] == 4
    asked = api.client.last
    assert asked.raw == RawPrompt(text="once")
    assert (asked.options.max_tokens, asked.options.seed) == (4, 3)
    assert asked.options.think == MEDIUM  # matters only where the prompt has opened the thinking


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", [RawPrompt(text="a")]),
        (["a", "b"], [RawPrompt(text="a"), RawPrompt(text="b")]),
        ([1, 2], [RawPrompt(tokens=(1, 2))]),
        ([[1], [2, 3]], [RawPrompt(tokens=(1,)), RawPrompt(tokens=(2, 3))]),
    ],
)
async def test_prompt_is_text_or_tokens_one_or_many(
    endpoint: Make, prompt: Any, prompts: list[RawPrompt]
) -> None:
    api = endpoint(*(reply(f"{i}") for i in range(len(prompts))))
    body = (await complete(api, prompt)).json()
    assert [request.raw for request in api.client.requests] == prompts
    texts = [(choice["index"], choice["text"]) for choice in body["choices"]]
    assert texts == [(i, f"{i}") for i in range(len(prompts))]


async def test_each_prompt_has_its_answers_and_counts_once(endpoint: Make) -> None:
    api = endpoint(*(reply(word) for word in "abcd"))
    body = (await complete(api, ["x", "y"], n=2, seed=5)).json()
    assert [choice["text"] for choice in body["choices"]] == list("abcd")
    asked = [(r.raw.text, r.options.seed) for r in api.client.requests]
    assert asked == [("x", 5), ("x", 6), ("y", 5), ("y", 6)]
    usage = body["usage"]
    assert usage["completion_tokens"] == 4
    assert usage["prompt_tokens"] == 2 * reply("a")[-1].usage.prompt_tokens


async def test_echo_gives_the_prompt_back(endpoint: Make) -> None:
    api = endpoint(reply(" upon"), reply(" upon"))
    assert (await complete(api, echo=True)).json()["choices"][0]["text"] == "once upon"
    stream = Stream.parse((await complete(api, echo=True, stream=True)).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in stream.chunks) == "once upon"


async def test_stream_ends_with_reason_usage_and_done(endpoint: Make) -> None:
    api = endpoint(reply(" upon a", reason="length"))
    fields = {"stream": True, "stream_options": {"include_usage": True}}
    stream = Stream.parse((await complete(api, **fields)).text)
    *_, last, usage = stream.chunks
    assert last["choices"][0]["finish_reason"] == "length"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 3)
    assert stream.is_done


@pytest.mark.parametrize("asked", [0, 1, 2])
async def test_logprobs_come_in_lists_side_by_side(endpoint: Make, asked: int) -> None:
    steps = [
        TokenLogprobs(b"a", -0.5, ((b"a", -0.5), (b"b", -1.5))[:asked]),
        TokenLogprobs(b"bc", -0.25, ((b"bc", -0.25), (b"d", -2.0))[:asked]),
        *reply("abc"),
    ]
    api = endpoint(steps)
    logprobs = (await complete(api, logprobs=asked)).json()["choices"][0]["logprobs"]
    assert api.client.last.options.logprobs == asked
    assert logprobs["tokens"] == ["a", "bc"]
    assert logprobs["token_logprobs"] == [-0.5, -0.25]
    assert logprobs["text_offset"] == [0, 1]
    assert [len(best) for best in logprobs["top_logprobs"]] == [max(1, asked)] * 2


async def test_thinking_of_a_prompt_that_opened_it_is_told_apart(endpoint: Make) -> None:
    api = endpoint([ThinkingDelta("hm"), *reply("4")])
    choice = (await complete(api, "2+2<think>")).json()["choices"][0]
    assert (choice["text"], choice["reasoning"]) == ("4", "hm")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"echo": True, "prompt": [1]}, "echo"),
        ({"best_of": 3}, "best_of"),
    ],
    ids=str,
)
async def test_completion_that_cannot_be_meant_is_refused(
    endpoint: Make, fields: dict[str, Any], param: str
) -> None:
    response = await complete(endpoint(), **fields)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


async def test_embeddings_are_not_made_here(endpoint: Make) -> None:
    response = await endpoint().request("POST", "/v1/embeddings", json={"input": "x"})
    assert response.status_code == 501
    assert "no embeddings" in error_of(response)["message"]
