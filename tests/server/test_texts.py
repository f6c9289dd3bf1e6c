from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.conftest import Endpoint, error_of

Make = Callable[..., Endpoint]
ASKED = [{"role": "user", "content": "hi"}]


async def post(api: Endpoint, path: str, **body: Any) -> dict[str, Any]:
    response = await api.request("POST", path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("name", ["content", "prompt"])
async def test_text_is_tokenized_under_either_name(endpoint: Make, name: str) -> None:
    answer = await post(endpoint(), "/tokenize", **{name: "ab"})
    assert answer == {"tokens": [97, 98], "count": 2, "max_model_len": 8192}


@pytest.mark.parametrize("name", ["add_special", "add_special_tokens"])
async def test_beginning_is_put_before_a_text_on_request(endpoint: Make, name: str) -> None:
    assert (await post(endpoint(), "/tokenize", content="a", **{name: True}))["tokens"] == [94, 97]


async def test_pieces_come_in_both_forms(endpoint: Make) -> None:
    answer = await post(endpoint(), "/tokenize", content="aü", with_pieces=True)
    assert answer["tokens"] == [
        {"id": 97, "piece": "a"}, {"id": 195, "piece": [195]}, {"id": 188, "piece": [188]},
    ]  # fmt: skip
    answer = await post(endpoint(), "/tokenize", prompt="ab", return_token_strs=True)
    assert (answer["tokens"], answer["token_strs"]) == ([97, 98], ["a", "b"])


async def test_prompt_of_messages_is_what_the_template_makes(endpoint: Make) -> None:
    prompt = (await post(endpoint(), "/apply-template", messages=ASKED))["prompt"]
    assert prompt == "user: hi\n"
    answer = await post(endpoint(), "/tokenize", messages=ASKED, tools=[])
    assert bytes(answer["tokens"]).decode() == prompt


async def test_tokens_become_their_text(endpoint: Make) -> None:
    answer = await post(endpoint(), "/detokenize", tokens=list("aü".encode()))
    assert answer == {"content": "aü", "prompt": "aü"}
    assert (await post(endpoint(), "/detokenize", tokens=[]))["content"] == ""


@pytest.mark.parametrize(
    "body",
    [{}, {"content": "a", "messages": ASKED}, {"messages": []}, {"content": "a", "add_specal": 1}],
)
async def test_what_is_neither_text_nor_messages_is_refused(
    endpoint: Make, body: dict[str, Any]
) -> None:
    response = await endpoint().request("POST", "/tokenize", json=body)
    assert response.status_code == 400
    assert error_of(response)["param"] in ("content", "messages", "add_specal")


async def test_counts_are_of_the_whole_prompt(endpoint: Make) -> None:
    body = {"model": "pico", "messages": ASKED, "system": "be short"}
    answer = await post(endpoint(), "/v1/messages/count_tokens", **body)
    assert answer == {"input_tokens": len("system: be short\nuser: hi\n")}
    body = {"model": "pico", "input": "hi", "instructions": "be short"}
    answer = await post(endpoint(), "/v1/responses/input_tokens", **body)
    assert answer["input_tokens"] == len("system: be short\nuser: hi\n")
