"""`--endpoint` and the remote engine against nanorun's own endpoint, over real sockets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from nanorun.model.chat import GenerateOptions, Message, ThinkingDelta
from nanorun.model.think import Think
from nanorun.runtime.remote import RemoteClient
from tests.e2e.conftest import Live
from tests.support.fakes import reply
from tests.support.waiting import PATIENCE_S

Start = Callable[..., Live]


def nanorun(*args: str, key: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nanorun", *args]
    env = {**os.environ, "NANORUN_API_KEY": key}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=env,
        timeout=PATIENCE_S,
    )


def test_run_asks_the_endpoint_and_loads_no_engine(live: Start) -> None:
    endpoint = live(reply("it is 4", thinking="two and two", cached_tokens=3))
    done = nanorun("run", "--endpoint", endpoint.url, "2+2?")
    assert (done.returncode, done.stdout, done.stderr) == (0, "it is 4\n", "two and two\n\n")
    assert endpoint.client.last.messages == (Message("user", "2+2?"),)
    done = nanorun("run", "--endpoint", endpoint.url, "pico", "2+2?", "--think", "77", "--json")
    body = json.loads(done.stdout)
    assert (body["thinking"], body["answer"]) == ("two and two", "it is 4")
    assert body["usage"] == {
        "prompt_tokens": 7, "cached_tokens": 3, "thinking_tokens": 3, "completion_tokens": 6,
        "drafted_tokens": 0, "accepted_tokens": 0,
    }  # fmt: skip
    assert endpoint.client.last.options.think == Think(77)


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("other", "hi"), 2, "has no model 'other'"),
        (("--n-ctx", "4k", "hi"), 2, "--n-ctx is for a model that is opened here"),
        ((), 2, "there is no prompt"),
    ],
)
def test_run_says_what_the_endpoint_cannot(
    live: Start, args: tuple[str, ...], code: int, says: str
) -> None:
    done = nanorun("run", "--endpoint", live(reply("x")).url, *args)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr


def test_run_sends_the_key_of_the_environment(live: Start) -> None:
    url = live(reply("it is 4"), api_keys=("sk-right",)).url
    assert nanorun("run", "--endpoint", url, "2+2?", key="sk-right").stdout == "it is 4\n"
    refused = nanorun("run", "--endpoint", url, "2+2?", key="sk-wrong")
    assert refused.returncode == 1
    assert f"{url}/models refused the API key" in refused.stderr
    assert "sk-wrong" not in refused.stderr


def test_run_says_when_nobody_answers() -> None:
    done = nanorun("run", "--endpoint", "127.0.0.1:1", "hi")
    assert (done.returncode, done.stdout) == (1, "")
    assert "http://127.0.0.1:1/v1/models cannot be reached: connection refused" in done.stderr


def test_chat_takes_an_endpoint_and_no_context() -> None:
    done = nanorun("chat", "--endpoint", "127.0.0.1:1", "--help")
    assert "--endpoint URL" in done.stdout


async def test_control_reaches_the_reply_that_streams(live: Start) -> None:
    endpoint = live(reply("4", thinking="hm " * 200, delay_s=0.02))
    client = RemoteClient(endpoint.url)
    generation = client.generate([Message("user", "2+2?")], GenerateOptions(keep_thinking=True))
    while not isinstance(await anext(generation), ThinkingDelta):
        pass
    await generation.set_budget(9)
    await generation.set_budget(None)
    await generation.finish_thinking()
    events = [event async for event in generation]
    theirs = endpoint.client.last.generation
    assert (theirs.budgets, theirs.was_hurried) == ([9, None], True)
    assert endpoint.client.last.options.keep_thinking
    assert sum(isinstance(event, ThinkingDelta) for event in events) < 199
    await client.close()
