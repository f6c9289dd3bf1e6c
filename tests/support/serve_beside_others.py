"""A real engine served while other programs take memory: python serve_beside_others.py GGUF NOTES.

Nothing is filled: what is free stands in the file `free` of the folder NOTES, in bytes. Every look
at it adds a byte to the file `looks`, and every process of the engine a line to `pids`.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanorun.model.engine_options import EngineOptions
from nanorun.model.main_memory import MainMemory
from nanorun.model.memory_needs import MemoryNeeds
from nanorun.runtime.client import EngineClient
from nanorun.runtime.process.machine_memory import MemoryNow
from nanorun.server.app import create_app
from nanorun.server.listen import bind, serve, url_of
from nanorun.server.settings import ServerSettings

GIB = 2**30
OPTIONS = EngineOptions(n_ctx=2048, n_threads=1)
SMALLER = EngineOptions(n_ctx=1024, n_threads=1)
# As of the case at full size: the weights alone are more than what others leave.
NEEDS = MemoryNeeds({OPTIONS: 20 * GIB, SMALLER: 18 * GIB}, 17 * GIB, GIB)


class Machine:
    """Memory of 24 GiB, of which others leave what a file says."""

    def __init__(self, notes: Path) -> None:
        self._notes = notes

    def before_loading(self) -> MainMemory:
        return MainMemory(24 * GIB, int((self._notes / "free").read_text()))

    def beside(self, pid: int) -> MemoryNow:
        pids = self._notes / "pids"
        if str(pid) not in (pids.read_text().split() if pids.exists() else []):
            with pids.open("a") as file:
                file.write(f"{pid}\n")
        with (self._notes / "looks").open("a") as file:
            file.write("x")
        return MemoryNow(max(0, self.before_loading().available_bytes))


def say(url: str) -> None:
    sys.stdout.write(f"{url}\n")
    sys.stdout.flush()


async def main(model: Path, notes: Path) -> None:
    client = EngineClient(
        model, OPTIONS, smaller=[(SMALLER, "half the context")], needs=NEEDS, memory=Machine(notes)
    )
    await client.start()
    listener = bind("127.0.0.1", 0)
    app = create_app(client, model_name="pico", settings=ServerSettings())
    try:
        await serve(app, listener, ServerSettings(), lambda _: say(url_of(listener)))
    finally:
        listener.close()
        await client.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
