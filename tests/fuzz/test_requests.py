"""Requests near those of the cases, to every API: an answer below 500 (or 503), and nothing left.

Without a socket; `test_raw_http.py` has the bytes around them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from hypothesis import strategies as st

from nanorun.server.app import create_app
from nanorun.server.settings import ServerSettings
from tests.fuzz.checking_client import CheckingClient
from tests.fuzz.effort import efforts, fuzz
from tests.fuzz.seeds import seeds
from tests.support.mutating import damaged, json_bytes, mutated
from tests.support.waiting import little_work

MOST_CPU_S = 5.0
BODIES = [json.dumps(seed["body"]).encode() for seed in seeds("requests")]
HELPFUL = {"messages": [{"role": "user", "content": "hi"}]}
RANDOMS = st.randoms(use_true_random=True)


class Asker:
    """One endpoint, and an event loop that answers."""

    def __init__(self, runner: asyncio.Runner, **settings: Any) -> None:
        self.client = CheckingClient()
        app = create_app(self.client, model_name="pico", settings=ServerSettings(**settings))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._http = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        self._runner = runner

    def ask(self, path: str, body: bytes) -> httpx.Response:
        """Send one body; what no answer may be is asserted."""
        return self._runner.run(self._ask(path, body))

    async def _ask(self, path: str, body: bytes) -> httpx.Response:
        headers = {"content-type": "application/json"}
        with little_work(MOST_CPU_S):
            response = await self._http.post(path, content=body, headers=headers)
        assert response.status_code < 500 or response.status_code == 503, response.text
        assert (await self._http.get("/health")).json()["n_active"] == 0
        assert len(asyncio.all_tasks()) == 1, "a task is left behind"
        return response


@contextmanager
def asking(**settings: Any) -> Iterator[Asker]:
    with asyncio.Runner() as runner:
        yield Asker(runner, **settings)


@pytest.fixture(scope="module")
def open_asker() -> Iterator[Asker]:
    with asking(any_model=True) as asker:
        yield asker


@pytest.mark.parametrize("seed", seeds("requests"), ids=lambda seed: str(seed)[:80])
def test_every_seed_is_answered(open_asker: Asker, seed: Any) -> None:
    open_asker.ask(seed["path"], json.dumps(seed["body"]).encode())


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    seed = draw(st.sampled_from(seeds("requests")))
    rng = draw(RANDOMS)
    value = mutated(seed["body"], rng)
    if isinstance(value, dict):  # most often with what lets it get further than its first check
        value = (HELPFUL if rng.random() < 0.8 else {}) | value
        value |= {"stream": True} if rng.random() < 0.3 else {}
    body = json_bytes(value, rng)
    return seed["path"], damaged(body, rng, BODIES) if rng.random() < 0.2 else body


@pytest.mark.parametrize("any_model", [False, True], ids=["one model", "any model"])
@efforts(few=50, many=5000)
def test_requests_near_the_cases(n_examples: int, any_model: bool) -> None:
    with asking(any_model=any_model) as asker:
        fuzz(lambda request: asker.ask(*request) and None, requests(), n_examples)
        assert asker.client.n_asked > n_examples / 10, "hardly any got as far as the model"
