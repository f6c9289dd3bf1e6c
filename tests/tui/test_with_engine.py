"""The chat on the real engine, whose process is killed in the middle of an answer."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from nanorun.model.chat import GenerateOptions
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import OFF
from nanorun.runtime.client import EngineClient
from tests.tui.harness import chatting


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
async def test_chat_survives_the_death_of_its_engine(pico_gguf: Path) -> None:
    # Pico says a thousand tokens a second: a small context would be full before anyone looks.
    client = EngineClient(pico_gguf, EngineOptions(n_ctx=65536, n_threads=1))
    endless = GenerateOptions(think=OFF, ignore_eos=True)
    async with chatting(client, options=endless) as chat:
        await chat.type("What is 1 + 2?")
        # `Pilot.press` would wait for an idle processor, by when pico has filled its context.
        chat.screen.composer.send()
        await chat.until(lambda: chat.state == "answering")
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await chat.settle()
        assert "the engine's process was ended by SIGKILL" in chat.text
        assert chat.history == []

        chat.screen.composer.send()
        await chat.until(lambda: chat.state == "answering")
        await chat.screen.action_stop()
        await chat.settle()
        assert [role for role, _ in chat.history] == ["user", "assistant"]
        assert chat.state == "ready"
        pid = client.pid
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
