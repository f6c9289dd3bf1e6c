"""What a request asks of the engine, whatever API it came by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nanorun.model.chat import GenerateOptions, Prompt

_SEED_MASK = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Asked:
    """One question to the engine, perhaps with several answers."""

    prompt: Prompt
    options: GenerateOptions
    n: int = 1
    """Answers wanted, each with a seed of its own."""
    notices: tuple[str, ...] = ()
    """What of the request was left out or taken otherwise than it was written."""
    more_prompts: tuple[Prompt, ...] = ()
    """Further prompts, each with `n` answers of its own, after those of `prompt`."""

    @property
    def n_answers(self) -> int:
        """Answers to all prompts."""
        return self.n * (1 + len(self.more_prompts))

    def answers(self) -> Iterator[tuple[Prompt, GenerateOptions]]:
        """What to ask for each answer; the seeds of a prompt's count up from the given one."""
        seed = self.options.seed
        for prompt in (self.prompt, *self.more_prompts):
            yield prompt, self.options
            for i in range(1, self.n):
                other = None if seed is None else (seed + i) & _SEED_MASK
                yield prompt, replace(self.options, seed=other)
