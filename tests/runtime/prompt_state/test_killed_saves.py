"""A conversation whose engine is killed while it saves loses at most the tail it had not saved."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest

from nanorun.model.chat import Finished, GenerateOptions, Message, TextDelta, Usage
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import OFF
from nanorun.runtime.client import EngineClient
from nanorun.runtime.prompt_state.store import SUFFIX, read_header

N_KILLS = 30
OPTIONS = GenerateOptions(think=OFF, temperature=0, max_tokens=8)


async def ask(client: EngineClient, messages: list[Message]) -> tuple[str, Usage]:
    answer = ""
    async for event in client.generate(messages, OPTIONS):
        if isinstance(event, TextDelta):
            answer += event.text
        elif isinstance(event, Finished):
            return answer, event.usage
    raise AssertionError("the reply did not finish")


async def kill_while_saving(client: EngineClient, folder: Path, rng: random.Random) -> None:
    """Wait until a save begins, then strike at some moment of the next milliseconds."""
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*")}
    for _ in range(5000):
        now = {path: path.stat().st_mtime_ns for path in folder.glob("*") if path.exists()}
        if now != before:
            break
        await asyncio.sleep(0.001)
    else:
        raise AssertionError("nothing was saved")
    await asyncio.sleep(rng.random() * 0.01)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)


def saved_tokens(folder: Path) -> int:
    """Tokens of the longest whole state."""
    return max((len(read_header(p).tokens) for p in folder.glob("*" + SUFFIX)), default=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_kills_while_saving_lose_at_most_the_unsaved_tail(
    pico_gguf: Path, tmp_path: Path
) -> None:
    rng = random.Random(7)
    options = EngineOptions(n_ctx=16384, n_threads=1, n_parallel=1, state_dir=str(tmp_path))
    client = EngineClient(pico_gguf, options)
    messages: list[Message] = []
    n_torn = 0
    for i in range(N_KILLS):
        messages.append(Message("user", "The sky is blue. Water is wet. " * 12 + f"{i} + {i}"))
        n_saved = saved_tokens(tmp_path)
        answer, usage = await ask(client, messages)
        # The state's last tokens are those of the turn's end, which the next prompt repeats.
        assert usage.cached_tokens >= n_saved - 1
        messages.append(Message("assistant", answer))
        await kill_while_saving(client, tmp_path, rng)
        await asyncio.sleep(0.05)
        n_torn += bool(list(tmp_path.glob("*.part")))
    assert n_torn > 0, "no kill fell into a write, so nothing was tested"
    fresh = EngineClient(pico_gguf, EngineOptions(n_ctx=16384, n_threads=1, n_parallel=1))
    question = [*messages, Message("user", "What is 47 + 86?")]
    assert (await ask(client, question))[0] == (await ask(fresh, question))[0]
    await client.close()
    await fresh.close()
