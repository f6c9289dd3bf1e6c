"""One question, one seed, through each API: the same text, whole or streamed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest

from tests.support.waiting import PATIENCE_S

QUESTIONS = ["What is 4785 + 697?", "What is 12 + 34?", "Say something."]
CALCULATOR = {
    "name": "calculator",
    "description": "Evaluate an arithmetic expression.",
    "input_schema": {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "The expression."}},
        "required": ["expression"],
    },
}


@pytest.fixture(scope="module")
def url(pico_gguf: Path) -> Iterator[str]:
    """The address of a server, without /v1."""
    command = [sys.executable, "-m", "nanorun", "serve", str(pico_gguf), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        words = (word.decode() for line in process.stderr for word in line.split())
        yield next(word for word in words if word.startswith("http://")).removesuffix("/v1")
        process.terminate()
        assert process.wait(PATIENCE_S) == 0


@pytest.fixture
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
def llama(url: str) -> Iterator[ollama.Client]:
    with ollama.Client(host=url) as client:
        yield client


def said_by(message: Any) -> tuple[str, str]:
    """Thinking and text of a message."""
    thinking = "".join(b.thinking for b in message.content if b.type == "thinking")
    return thinking, "".join(b.text for b in message.content if b.type == "text")


def thinking_in(response: Any) -> str:
    """Thinking of a response."""
    items = [item for item in response.output if item.type == "reasoning"]
    return "".join(part.text for item in items for part in item.content)


def _respond_both_ways(client: openai.OpenAI, **arguments: Any) -> list[Any]:
    """A response made whole, and one that the client built of a stream."""
    whole = client.responses.create(**arguments)
    with client.responses.stream(**arguments) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        streamed = stream.get_final_response()
    assert text == streamed.output_text
    return [whole, streamed]


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_api_says_the_same(
    url: str, claude: anthropic.Anthropic, llama: ollama.Client, question: str
) -> None:
    asked: list[Any] = [{"role": "user", "content": question}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        reply = client.chat.completions.create(
            model="pico", messages=asked, temperature=0, max_tokens=200
        )
        responses = _respond_both_ways(
            client, input=asked, temperature=0, max_output_tokens=200, model="pico"
        )
        prompt = httpx.post(f"{url}/apply-template", json={"messages": asked}).json()["prompt"]
        raw = client.completions.create(model="pico", prompt=prompt, temperature=0, max_tokens=200)
    said: Any = reply.choices[0].message
    expected = (said.reasoning or "", said.content or "")
    choice: Any = raw.choices[0]
    assert (choice.reasoning, choice.text.strip()) == expected
    asked_for = httpx.post(f"{url}/tokenize", json={"messages": asked}).json()
    assert asked_for["count"] == reply.usage.prompt_tokens == raw.usage.prompt_tokens
    counted = claude.messages.count_tokens(model="pico", messages=asked)
    assert counted.input_tokens == asked_for["count"]
    for response in responses:
        assert (thinking_in(response), response.output_text) == expected
    arguments: dict[str, Any] = {"model": "pico", "messages": asked, "max_tokens": 200,
                                 "extra_body": {"temperature": 0}}  # fmt: skip
    assert said_by(claude.messages.create(**arguments)) == expected
    with claude.messages.stream(**arguments) as stream:
        text = "".join(stream.text_stream)
        assert said_by(stream.get_final_message()) == expected
    assert text == expected[1]
    options = {"temperature": 0, "num_predict": 200}
    told = llama.chat("pico", asked, options=options).message
    assert ((told.thinking or ""), (told.content or "")) == expected
    parts = [part.message for part in llama.chat("pico", asked, options=options, stream=True)]
    assert "".join(part.thinking or "" for part in parts) == expected[0]
    assert "".join(part.content or "" for part in parts) == expected[1]
    generated = llama.generate("pico", question, options=options)
    assert ((generated.thinking or ""), generated.response) == expected


def test_answer_that_was_begun_goes_on_through_each_api(
    url: str, claude: anthropic.Anthropic, llama: ollama.Client
) -> None:
    asked: list[Any] = [{"role": "user", "content": "What is 4785 + 697?"}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        ask: dict[str, Any] = {"model": "pico", "temperature": 0}
        said: Any = client.chat.completions.create(messages=asked, **ask).choices[0].message
        thinking = said.reasoning
        begun: Any = {"role": "assistant", "content": "54", "reasoning": thinking}
        rest = client.chat.completions.create(messages=[*asked, begun], **ask).choices[0].message
    assert (said.content, rest.content) == ("5482", "82")
    blocks = [{"type": "thinking", "thinking": thinking, "signature": ""},
              {"type": "text", "text": "54"}]  # fmt: skip
    turns: list[Any] = [*asked, {"role": "assistant", "content": blocks}]
    message = claude.messages.create(
        model="pico", messages=turns, max_tokens=99, extra_body={"temperature": 0}
    )
    assert said_by(message) == ("", "82")
    turns = [*asked, {"role": "assistant", "content": "54", "thinking": thinking}]
    told = llama.chat("pico", turns, options={"temperature": 0}).message
    assert (told.thinking, told.content) == (None, "82")


@pytest.mark.parametrize("streamed", [False, True])
def test_messages_call_the_calculator_and_say_what_it_said(
    claude: anthropic.Anthropic, streamed: bool
) -> None:
    asked: list[Any] = [{"role": "user", "content": "Use the calculator: what is 12 + 34?"}]
    ask: dict[str, Any] = {"model": "pico", "tools": [CALCULATOR], "max_tokens": 400}
    first = _ask(claude, streamed, messages=asked, tool_choice={"type": "any"}, **ask)
    assert first.stop_reason == "tool_use"
    (use,) = [block for block in first.content if block.type == "tool_use"]
    assert set(use.input) == {"expression"}
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "46"}
    asked += [
        {"role": "assistant", "content": [block.model_dump() for block in first.content]},
        {"role": "user", "content": [result]},
    ]
    second = _ask(claude, streamed, messages=asked, **ask)
    assert "46" in said_by(second)[1]
    assert second.usage.cache_read_input_tokens > 0


def _ask(claude: anthropic.Anthropic, streamed: bool, **arguments: Any) -> Any:
    if not streamed:
        return claude.messages.create(**arguments)
    with claude.messages.stream(**arguments) as stream:
        return stream.get_final_message()


def test_next_turn_reads_what_is_new(claude: anthropic.Anthropic) -> None:
    turns: list[Any] = [{"role": "user", "content": "What is 12 + 34?"}]
    first = claude.messages.create(model="pico", messages=turns, max_tokens=200)
    turns += [
        {"role": "assistant", "content": [block.model_dump() for block in first.content]},
        {"role": "user", "content": "And 7 + 8?"},
    ]
    second = claude.messages.create(model="pico", messages=turns, max_tokens=200)
    n_first, n_second = (
        u.input_tokens + u.cache_read_input_tokens for u in (first.usage, second.usage)
    )
    assert second.usage.input_tokens <= n_second - n_first + 16


def test_errors_are_the_clients_own(claude: anthropic.Anthropic) -> None:
    asked: list[Any] = [{"role": "user", "content": "hi"}]
    with pytest.raises(anthropic.NotFoundError, match="pico"):
        claude.messages.create(model="claude", messages=asked, max_tokens=9)
    picture: list[Any] = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    with pytest.raises(anthropic.BadRequestError, match="text only"):
        claude.messages.create(model="pico-q8_0", messages=picture, max_tokens=9)


def test_ollamas_client_calls_the_calculator_and_sees_the_model(llama: ollama.Client) -> None:
    function = {**CALCULATOR, "parameters": CALCULATOR["input_schema"]}
    del function["input_schema"]
    tools: list[Any] = [{"type": "function", "function": function}]
    asked: list[Any] = [{"role": "user", "content": "What is 12 * 34?"}]
    first = llama.chat("pico", asked, tools=tools, options={"temperature": 0}).message
    (call,) = first.tool_calls or ()
    assert call.function.arguments == {"expression": "12 * 34"}
    asked += [first.model_dump(), {"role": "tool", "tool_name": "calculator", "content": "408"}]
    second = llama.chat("pico", asked, tools=tools, options={"temperature": 0}).message
    assert (second.content or "").strip() == "408"
    assert [model.model for model in llama.list().models] == ["pico-q8_0"]
    assert llama.show("pico").capabilities == ["completion", "tools", "thinking"]
    assert llama.ps().models[0].context_length
    with pytest.raises(ollama.ResponseError, match="is not served"):
        llama.pull("nano")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_responses_call_the_calculator_and_say_what_it_said(
    url: str, streamed: bool, stored: bool
) -> None:
    """Stored, the second request names the first; else it sends everything back."""
    parameters = {**CALCULATOR["input_schema"], "additionalProperties": False}
    function = {"type": "function", "name": "calculator", "strict": True, "parameters": parameters}
    asked: list[Any] = [{"role": "user", "content": "Use the calculator: what is 12 + 34?"}]
    ask = {"model": "pico", "tools": [function], "max_output_tokens": 400, "store": stored}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        first = _respond(client, streamed, input=asked, tool_choice="required", **ask)
        (call,) = [item for item in first.output if item.type == "function_call"]
        assert set(json.loads(call.arguments)) == {"expression"}
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "46"}
        if stored:
            ask |= {"input": [result], "previous_response_id": first.id}
        else:
            given = [item.model_dump(exclude_none=True) for item in first.output]
            ask["input"] = [*asked, *given, result]
        second = _respond(client, streamed, **ask)
    assert "46" in second.output_text
    n_new = second.usage.input_tokens - first.usage.input_tokens
    n_read = second.usage.input_tokens - second.usage.input_tokens_details.cached_tokens
    assert n_read <= n_new + 16


def _respond(client: openai.OpenAI, streamed: bool, **arguments: Any) -> Any:
    if not streamed:
        return client.responses.create(**arguments)
    with client.responses.stream(**arguments) as stream:
        return stream.get_final_response()
