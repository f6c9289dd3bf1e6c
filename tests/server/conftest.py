"""An endpoint over a fake client, asked without a socket."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from nanorun.server.app import create_app
from nanorun.server.settings import ServerSettings
from tests.support.fakes import FakeClient

CHAT = "/v1/chat/completions"


@dataclass
class Endpoint:
    """The app, what it is over, and requests to it."""

    client: FakeClient
    settings: ServerSettings

    def __post_init__(self) -> None:
        self.app = create_app(self.client, model_name="pico", settings=self.settings)

    async def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        # An unforeseen error is answered and then raised again for the server's log.
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as http:
            return await http.request(method, path, **options)

    async def chat(self, prompt: str = "hi", **fields: Any) -> httpx.Response:
        body = {"model": "pico", "messages": [{"role": "user", "content": prompt}], **fields}
        return await self.request("POST", CHAT, json=body)

    async def stream(self, **fields: Any) -> Stream:
        response = await self.chat(stream=True, **fields)
        assert response.status_code == 200, response.text
        return Stream.parse(response.text)


@dataclass
class Stream:
    """A stream of events, taken apart."""

    chunks: list[dict[str, Any]]
    comments: list[str]
    is_done: bool

    @classmethod
    def parse(cls, text: str) -> Stream:
        blocks = [block for block in text.split("\n\n") if block]
        data = [block.removeprefix("data: ") for block in blocks if block.startswith("data: ")]
        comments = [block.removeprefix(": ") for block in blocks if block.startswith(":")]
        assert len(data) + len(comments) == len(blocks), text
        done = data[-1:] == ["[DONE]"]
        return cls([json.loads(item) for item in data if item != "[DONE]"], comments, done)

    @property
    def deltas(self) -> list[dict[str, Any]]:
        return [c["choices"][0]["delta"] for c in self.chunks if c.get("choices")]

    def text(self, key: str) -> str:
        return "".join(delta.get(key) or "" for delta in self.deltas)


def named_events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each of which is named as its data says."""
    events = []
    for block in text.split("\n\n"):
        if block and not block.startswith(":"):
            name, data = block.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
    return events


@pytest.fixture
def endpoint() -> Callable[..., Endpoint]:
    """Makes an endpoint over a client that plays the given scripts."""

    def make(*scripts: Any, client: FakeClient | None = None, **settings: Any) -> Endpoint:
        fake = client or (FakeClient.playing(*scripts) if scripts else FakeClient())
        return Endpoint(fake, ServerSettings(**settings))

    return make


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error in a body of OpenAI's form."""
    body = response.json()
    assert set(body) == {"error"}, body
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert error["message"]
    return error
