"""What a request asks of the engine, whatever API it came by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nanorun.model.chat import GenerateOptions, Message

_SEED_MASK = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Asked:
    """One question to the engine, perhaps with several answers."""

    messages: tuple[Message, ...]
    options: GenerateOptions
    n: int = 1
    """Answers wanted, each with a seed of its own."""
    notices: tuple[str, ...] = ()
    """What of the request was left out or taken otherwise than it was written."""

    def choices(self) -> Iterator[GenerateOptions]:
        """The options of each answer: their seeds count up from the one that was given."""
        seed = self.options.seed
        for i in range(self.n):
            yield (
                self.options
                if seed is None or not i
                else replace(self.options, seed=(seed + i) & _SEED_MASK)
            )
