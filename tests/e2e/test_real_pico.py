"""The endpoint with the real engine behind it, through the official client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

SUM = [{"role": "user", "content": "What is 4785 + 697?"}]


@pytest.fixture(scope="module")
def server(pico_gguf: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "nanorun", "serve", str(pico_gguf), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/v1"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    yield url, process
    process.terminate()
    assert process.wait(timeout=30) == 0


@pytest.fixture
def client(server: tuple[str, subprocess.Popen[bytes]]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server[0], api_key="unused", max_retries=0) as client:
        yield client


def test_openai_client_streams_reasoning_content_and_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="pico", messages=SUM, stream=True, stream_options={"include_usage": True}
    )  # type: ignore[call-overload]
    thinking = answer = ""
    reason = usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            thinking += getattr(choice.delta, "reasoning_content", None) or ""
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
