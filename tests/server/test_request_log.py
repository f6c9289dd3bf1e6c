from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable

import pytest

from nanorun.errors import EngineDied
from nanorun.model.chat import PrefillProgress, TextDelta
from nanorun.server.keys import ApiKey
from nanorun.server.request_log import MOST_CONTENT_BYTES
from tests.server.conftest import CHAT, Endpoint
from tests.support.fakes import reply

Make = Callable[..., Endpoint]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged of requests so far."""
    caplog.set_level(logging.INFO, "nanorun.server.request_log")
    return lambda: [r.getMessage() for r in caplog.records if r.name.endswith("request_log")]


def test_log_has_a_line_a_request_without_contents(
    endpoint: Make, lines: Callable[[], list[str]]
) -> None:
    keys = (ApiKey("laptop", "sk-1"),)
    api = endpoint(reply("answerword two", cached_tokens=4), log_requests=True, named_keys=keys)
    body = {"messages": [{"role": "user", "content": "questionword"}]}
    headers = {"authorization": "Bearer sk-1"}
    response = asyncio.run(api.request("POST", f"{CHAT}?key=hidden", json=body, headers=headers))
    (line,) = lines()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT[\d:]+[+-]\d\d:\d\d POST /v1/chat/completions 200 key=laptop model=pico"
        r" prompt=7 cached=4 generated=2 first=\d+ms total=\d+ms finish=stop"
        rf" id={response.headers['x-request-id']}",
        line,
    )
    for word in ("answerword", "questionword", "sk-1", "hidden"):
        assert word not in line


async def test_refused_request_is_logged(endpoint: Make, lines: Callable[[], list[str]]) -> None:
    api = endpoint(log_requests=True, api_keys=("k",))
    await api.request("GET", "/slots", headers={"x-api-key": "wrong"})
    await api.request("GET", "/a%0Ananorun: 2026 b", headers={"x-api-key": "k"})
    first, second = lines()
    assert " GET /slots 401 total=" in first
    assert " GET /a%0Ananorun:%202026%20b 404 key=key-1 total=" in second


async def test_looks_are_not_logged(endpoint: Make, lines: Callable[[], list[str]]) -> None:
    api = endpoint(log_requests=True)
    for path in ("/health", "/metrics", "/v1/models", "/slots", "/props"):
        assert (await api.request("GET", path)).status_code == 200
    assert lines() == []


async def test_log_tells_of_a_stream_that_failed(
    endpoint: Make, lines: Callable[[], list[str]]
) -> None:
    script = [PrefillProgress(64, 100, 32), TextDelta("a"), EngineDied("gone")]
    await endpoint(script, log_requests=True).chat(stream=True)
    assert " 200 model=pico prompt=100 cached=32 generated=1 " in lines()[-1]
    assert " finish=abort error=engine_died id=" in lines()[-1]


async def test_log_is_quiet_where_it_is_not_wanted(
    endpoint: Make, lines: Callable[[], list[str]]
) -> None:
    await endpoint(reply("x"), log_requests=False).chat()
    assert lines() == []


@pytest.mark.parametrize("stream", [False, True])
async def test_contents_are_logged_where_they_are_wanted(
    endpoint: Make, lines: Callable[[], list[str]], stream: bool
) -> None:
    api = endpoint(reply("answerword\x1b[2J"), log_contents=True)
    await api.chat("questionword " + "x" * 5000, stream=stream)
    asked, answered = lines()
    assert " asked " in asked and "questionword" in asked
    assert re.search(r" and \d+ bytes more$", asked)
    assert len(asked) < MOST_CONTENT_BYTES + 1000
    assert " answered " in answered and "answerword" in answered
    assert "\x1b" not in answered and "\n" not in answered
