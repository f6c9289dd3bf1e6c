"""nanorun: a desktop and edge runner for NVIDIA Nemotron 3 Nano."""

from __future__ import annotations

__version__ = "0.1.0"
