"""The whole command line over a fake client, as a process: python fake_nanorun.py CASE ARGS.

For what only a process shows: signals, pipes, terminals, exit codes. How far it is and when it may
go on are files, in the folder that FAKE_NANORUN_NOTES names: `started`, `asked` and `go-on`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanorun.cli import main
from nanorun.model.chat import ModelInfo, PrefillProgress, ThinkingDelta
from tests.support.fakes import FakeClient, FakeGeneration, fake_shape, reply


def notes() -> Path:
    """The folder in which this process and its test tell each other how far they are."""
    return Path(os.environ["FAKE_NANORUN_NOTES"])


class NotingClient(FakeClient):
    """Notes when it is started and when it is asked."""

    async def start(self) -> ModelInfo:
        (notes() / "started").touch()
        return await super().start()

    def generate(self, messages: Any, options: Any) -> FakeGeneration:
        (notes() / "asked").touch()
        return super().generate(messages, options)


class Gate(asyncio.Event):
    """Opens when the test says `go-on`."""

    async def wait(self) -> Literal[True]:
        while not (notes() / "go-on").exists():
            await asyncio.sleep(0.02)
        return True


def gated() -> FakeClient:
    steps = reply("word " * 50)
    return FakeClient.playing([*steps[:25], Gate(), *steps[25:]])


class StubbornGeneration(FakeGeneration):
    """Goes on whatever it is told."""

    async def cancel(self) -> None:
        pass


class StubbornClient(FakeClient):
    def generate(self, messages: Any, options: Any) -> FakeGeneration:
        return StubbornGeneration(self.scripts[0])


class EchoClient(FakeClient):
    """Answers with the question, line ends as bars."""

    def generate(self, messages: Any, options: Any) -> FakeGeneration:
        return FakeGeneration(reply(messages[-1].content.replace("\n", "|")))


LONG = reply("word " * 3000, thinking="hm", delay_s=0.02)
CASES: dict[str, Callable[[], FakeClient]] = {
    "short": lambda: FakeClient.playing(reply("it is 4", thinking="two and two")),
    "long": lambda: FakeClient.playing(LONG),
    "long and noted": lambda: NotingClient.playing(LONG),
    "gated": gated,
    "stubborn": lambda: StubbornClient.playing(LONG),
    "echo": EchoClient,
    "broken": lambda: FakeClient.playing([ZeroDivisionError("oops")]),
    "loading": lambda: NotingClient(start_delay_s=60),
    "escapes": lambda: FakeClient.playing(
        [
            PrefillProgress(512, 4096, 0),
            ThinkingDelta("\x1b]0;title\x07hm"),
            *reply("red \x1b[31malert\x9b0m\tend"),
        ]
    ),
}


def run(case: str, args: list[str]) -> None:
    """Replace what would start an engine, then be the `nanorun` command."""
    import nanorun.cli.planning
    import nanorun.library
    import nanorun.runtime.client

    def resolve(name_or_path: str, *, progress: Any = None) -> Path:
        return Path(f"/models/{name_or_path}.gguf")

    client = CASES[case]()
    nanorun.runtime.client.EngineClient = (  # type: ignore[misc,assignment]
        lambda *_args, **_options: client
    )
    nanorun.library.resolve_model = resolve
    nanorun.cli.planning.shape_of_file = fake_shape
    main(args)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
