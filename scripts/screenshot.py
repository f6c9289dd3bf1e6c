"""Draw docs/chat.svg: the chat in a headless terminal, with real answers of a real model.

python scripts/screenshot.py [MODEL] [--out FILE] [--ask QUESTION ...]
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from nanorun.model.chat import GenerateOptions
from nanorun.model.think import HIGH
from nanorun.tui.app import NanorunApp
from nanorun.tui.screens.chat import ChatScreen

if TYPE_CHECKING:
    from nanorun.runtime.protocol import Client

QUESTIONS = ["What is 4785 + 697?", "What is 58 + 367?"]
SIZE = (92, 24)
PATIENCE_S = 120.0
_LOOK_EVERY_S = 0.05


async def draw(client: Client, model_name: str, questions: list[str]) -> str:
    """The chat as SVG after it has answered; the first thinking is unfolded."""
    options = GenerateOptions(think=HIGH, temperature=0.0)
    app = NanorunApp(client, model_name=model_name, options=options)
    async with app.run_test(size=SIZE) as pilot, asyncio.timeout(PATIENCE_S):
        screen = app.screen
        assert isinstance(screen, ChatScreen)
        for question in questions:
            screen.composer.insert(question)
            screen.composer.send()
            await pilot.pause()
            while screen.turn is not None:
                await asyncio.sleep(_LOOK_EVERY_S)
        screen.transcript.turns[0].thinking.is_open = True
        await pilot.pause()
        return app.export_screenshot(title="nanorun chat")


def main() -> None:
    """Draw the picture."""
    from nanorun.cli.models import context_size, find_model
    from nanorun.model.engine_options import EngineOptions
    from nanorun.runtime.client import EngineClient

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="pico")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "chat.svg")
    parser.add_argument("--ask", action="append", metavar="QUESTION", help="may be repeated")
    args = parser.parse_args()
    path = find_model(args.model)
    client = EngineClient(path, EngineOptions(n_ctx=context_size(None, path)))
    svg = asyncio.run(draw(client, args.model, args.ask or QUESTIONS))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(svg, encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
