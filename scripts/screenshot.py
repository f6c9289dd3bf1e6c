"""Draw docs/chat.svg: the chat after a real answer of pico, its thinking unfolded.

python scripts/screenshot.py [--out docs/chat.svg]
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from nanorun.library import resolve_model
from nanorun.runtime.client import EngineClient
from nanorun.runtime.options import EngineOptions
from nanorun.tui.app import NanorunApp


async def draw(out: Path) -> None:
    """Ask, wait, unfold, export."""
    client = EngineClient(resolve_model("pico"), EngineOptions(n_ctx=4096))
    app = NanorunApp(client, model_name="pico")
    async with app.run_test(size=(96, 28)) as pilot:
        for question in ("What is 4785 + 697?", "1234 + 8766"):
            await pilot.pause(1.0)
            await pilot.press(*question, "enter")
            await pilot.pause(0.5)
            await app.workers.wait_for_complete()
            await pilot.pause(1.0)
        await pilot.press("ctrl+t")
        await pilot.pause(0.5)
        out.write_text(app.export_screenshot(title="nanorun"), encoding="utf-8")
    await client.close()


def main() -> None:
    """Parse flags, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/chat.svg"))
    asyncio.run(draw(parser.parse_args().out))


if __name__ == "__main__":
    main()
