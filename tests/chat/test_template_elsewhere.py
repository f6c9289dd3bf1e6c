"""pico's chat template in llama.cpp's own template engine: files made here must work there."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanorun.chat.template import ChatTemplate
from nanorun.model.chat import Message, ToolCall
from nanorun.model.gguf import read_gguf

pytestmark = pytest.mark.slow

SERVER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx = sys.argv[1], int(sys.argv[2]), 512
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
time.sleep(10**6)
"""
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
CALLS: list[dict[str, Any]] = [{"a": 1, "b": 2}, {}]


@pytest.fixture(scope="module")
def address(pico_gguf: Path) -> Iterator[str]:
    """Of a server of llama.cpp with pico."""
    pytest.importorskip("xllamacpp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVER, str(pico_gguf), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 90
        while not is_up(url):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.wait()


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("arguments", CALLS)
def test_second_turn_with_tools_is_rendered_alike(
    arguments: dict[str, Any], address: str, pico_gguf: Path
) -> None:
    call = {"id": "c1", "type": "function"} | {
        "function": {"name": "add", "arguments": json.dumps(arguments)}
    }
    conversation = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]
    answer = httpx.post(
        f"{address}/apply-template", json={"messages": conversation, "tools": [TOOL]}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    template = ChatTemplate(read_gguf(pico_gguf).metadata["tokenizer.chat_template"])
    rendered = template.render(
        [
            Message("user", "1+2?"),
            Message("assistant", "", tool_calls=(ToolCall("c1", "add", arguments),)),
            Message("tool", "3", tool_call_id="c1"),
        ],
        tools=[TOOL],
        enable_thinking=True,
    )
    assert answer.json()["prompt"] == rendered.text
