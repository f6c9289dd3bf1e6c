"""The machines that plans are tested on."""

from __future__ import annotations

from pathlib import Path

from nanorun.plan.machine.hardware import Hardware, read_profile

FOLDER = Path(__file__).parents[1] / "data" / "hardware"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def profile(name: str) -> Hardware:
    return read_profile(FOLDER / f"{name}.json")
