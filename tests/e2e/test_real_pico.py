"""The endpoint with the real engine behind it, through the official client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.support.waiting import PATIENCE_S

SUM = [{"role": "user", "content": "What is 4785 + 697?"}]


@pytest.fixture(scope="module")
def server(pico_gguf: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    command = [sys.executable, "-m", "nanorun", "serve", str(pico_gguf), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        words = (word.decode() for line in process.stderr for word in line.split())
        yield next(word for word in words if word.startswith("http://")), process
        process.terminate()
        assert process.wait(PATIENCE_S) == 0


@pytest.fixture
def client(server: tuple[str, subprocess.Popen[bytes]]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server[0], api_key="unused", max_retries=0) as client:
        yield client


def test_openai_client_streams_reasoning_and_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="pico", messages=SUM, stream=True, stream_options={"include_usage": True}
    )  # type: ignore[call-overload]
    thinking = answer = ""
    reason = usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            thinking += getattr(choice.delta, "reasoning", None) or ""
            answer += choice.delta.content or ""
            reason = choice.finish_reason or reason
    assert thinking.startswith("5+7+0=12")
    assert answer.strip() == "5482"
    assert reason == "stop"
    assert usage.completion_tokens_details.reasoning_tokens > 10


def test_openai_client_gets_a_whole_reply(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="pico", messages=SUM)  # type: ignore[arg-type]
    assert reply.choices[0].message.content.strip() == "5482"
    assert [model.id for model in client.models.list()] == ["pico-q8_0"]


CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "The expression."}},
            "required": ["expression"],
        },
    },
}


@pytest.mark.parametrize(("a", "b"), [(12, 34), (123, 45), (7, 806)])
def test_pico_asks_the_calculator_and_says_what_it_said(
    client: openai.OpenAI, a: int, b: int
) -> None:
    messages: list[Any] = [{"role": "user", "content": f"What is {a} * {b}?"}]
    ask = partial(client.chat.completions.create, model="pico", tools=[CALCULATOR], temperature=0)
    first = ask(messages=messages).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls
    expression = json.loads(call.function.arguments)["expression"]
    assert expression == f"{a} * {b}"
    messages += [
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": str(a * b)},
    ]
    second = ask(messages=messages).choices[0]
    assert (second.finish_reason, second.message.content.strip()) == ("stop", str(a * b))


def test_openai_client_gets_an_answer_that_fits_its_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model="pico",
        messages=[{"role": "user", "content": "Reply in JSON: name fox, age 31"}],
        response_format={"type": "json_schema", "json_schema": {"name": "who", "schema": schema}},
        temperature=0,
    )  # type: ignore[call-overload]
    assert json.loads(reply.choices[0].message.content) == {"name": "fox", "age": 31}


def test_openai_client_gets_log_probabilities(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="pico",
        messages=[{"role": "user", "content": "Hello"}],
        reasoning_effort="none",
        logprobs=True,
        top_logprobs=2,
        temperature=0,
    )  # type: ignore[call-overload]
    tokens = reply.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == reply.choices[0].message.content
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)


def test_server_survives_the_death_of_its_engine(
    server: tuple[str, subprocess.Popen[bytes]], client: openai.OpenAI
) -> None:
    stream = client.chat.completions.create(
        model="pico",
        messages=SUM,  # type: ignore[arg-type]
        stream=True,
        reasoning_effort="none",
        extra_body={"ignore_eos": True},
    )
    with pytest.raises(openai.APIError, match="SIGKILL"):
        for i, _ in enumerate(stream):
            if i == 5:
                (engine,) = psutil.Process(server[1].pid).children()
                os.kill(engine.pid, signal.SIGKILL)
    reply = client.chat.completions.create(model="pico", messages=SUM)  # type: ignore[arg-type]
    assert reply.choices[0].message.content.strip() == "5482"
