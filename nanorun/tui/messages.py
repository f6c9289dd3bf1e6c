"""What the workers tell the screen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from textual.message import Message

from nanorun.errors import NanorunError
from nanorun.model.chat import ModelInfo

if TYPE_CHECKING:
    from nanorun.tui.widgets.turn import Turn


@dataclass
class EngineReady(Message):
    """The model is loaded."""

    info: ModelInfo


@dataclass
class EngineFailed(Message):
    """The model could not be loaded."""

    error: NanorunError


@dataclass
class ReplyEnded(Message):
    """A reply came to its end, was stopped, or failed with an error."""

    turn: Turn
    error: NanorunError | None = None
