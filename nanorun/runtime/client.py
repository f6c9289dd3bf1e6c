"""The local engine: an async client of the child process that runs it.

`keeper` has the process, `generation` a reply; a process that dies takes its running replies with
it and nothing else: they end with `EngineDied`, and the next request starts a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import TypeVar

from nanorun.errors import EngineDied
from nanorun.model.chat import (
    EngineStats,
    GenerateOptions,
    Message,
    ModelInfo,
    Prompt,
    PromptTokens,
    RawPrompt,
)
from nanorun.model.engine_options import EngineOptions
from nanorun.model.engine_state import EngineState
from nanorun.model.memory_needs import MemoryNeeds
from nanorun.runtime.generation import EngineGeneration
from nanorun.runtime.keeper import EngineKeeper
from nanorun.runtime.memory_watch import MemoryReader
from nanorun.runtime.process.frames import (
    Answer,
    Cancel,
    Detokenize,
    Failed,
    Generate,
    Pieces,
    Progress,
    Render,
    Rendered,
    Request,
    Score,
    Scored,
    Statistics,
    Stats,
    Tokenize,
    Tokens,
)

A = TypeVar("A", bound=Answer)


class EngineClient:
    """An engine in a child process.

    Args:
        model: A GGUF file.
        options: How it is opened.
        smaller: What to try, one after the other, when memory runs out: options, and what they
            change in words.
        needs: What each way to open the model takes of main memory; what does not fit is not
            loaded, and memory is watched while it is. Without it, everything counts as fitting.
        memory: Tells how main memory stands.
        keep_alive_s: Idle time after which the model is unloaded; the next request loads it again.
            None to keep it.
    """

    def __init__(
        self,
        model: Path,
        options: EngineOptions | None = None,
        *,
        smaller: Sequence[tuple[EngineOptions, str]] = (),
        needs: MemoryNeeds | None = None,
        memory: MemoryReader | None = None,
        keep_alive_s: float | None = None,
    ) -> None:
        self._keeper = EngineKeeper(
            model, options, smaller=smaller, needs=needs, memory=memory, keep_alive_s=keep_alive_s
        )
        self._ids = count(1)

    @property
    def info(self) -> ModelInfo | None:
        """What the model is; None before the first `start`."""
        return self._keeper.info

    @property
    def options(self) -> EngineOptions:
        """How the model is opened now."""
        return self._keeper.options

    @property
    def state(self) -> EngineState:
        """What becomes of a request that comes now."""
        return self._keeper.state

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is one."""
        return self._keeper.pid

    @property
    def n_restarts(self) -> int:
        """Children that were started after one that died."""
        return self._keeper.n_restarts

    async def start(self) -> ModelInfo:
        """Start the child and load the model; see `EngineKeeper.start` for what it raises."""
        return await self._keeper.start()

    async def close(self) -> None:
        """End the child; replies still running end with `EngineDied`."""
        await self._keeper.close()

    def generate(self, prompt: Prompt, options: GenerateOptions) -> EngineGeneration:
        """Begin a reply; the child is started on first use."""
        return EngineGeneration(self._keeper, Generate(self._new_id(), _as_sent(prompt), options))

    async def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; `special` lets control-token texts become control tokens."""
        answer = await self._ask(Tokenize(self._new_id(), text, special), Tokens)
        return list(answer.tokens)

    async def pieces(self, tokens: Sequence[int], *, special: bool = True) -> list[bytes]:
        """The bytes that each token stands for; a character may be shared by several.

        Args:
            tokens: Token ids, shape `(n,)`.
            special: Whether control tokens give their texts; else they give nothing.

        Raises:
            UsageError: If the model has no such token.
        """
        asked = Detokenize(self._new_id(), tuple(tokens), special)
        return list((await self._ask(asked, Pieces)).pieces)

    async def detokenize(self, tokens: Sequence[int], *, special: bool = True) -> str:
        """The text that tokens stand for, as `pieces`; what is no UTF-8 becomes U+FFFD."""
        return b"".join(await self.pieces(tokens, special=special)).decode("utf-8", "replace")

    async def render(self, prompt: Prompt, options: GenerateOptions) -> PromptTokens:
        """What the model would read of a prompt, if it were to answer it with these options.

        Raises:
            UsageError: If the messages, options or tokens make no sense.
            ModelError: If the model's template makes nothing of the messages.
        """
        rendered = await self._render(prompt, options, counts_only=False)
        assert rendered.prompt is not None
        return rendered.prompt

    async def count_tokens(self, prompt: Prompt, options: GenerateOptions) -> int:
        """How many tokens that is; it raises what `render` raises."""
        return (await self._render(prompt, options, counts_only=True)).n_tokens

    async def _render(
        self, prompt: Prompt, options: GenerateOptions, *, counts_only: bool
    ) -> Rendered:
        request = Render(self._new_id(), _as_sent(prompt), options, counts_only)
        return await self._ask(request, Rendered)

    async def stats(self) -> EngineStats:
        """What the engine holds right now."""
        return (await self._ask(Stats(self._new_id()), Statistics)).stats

    async def score(
        self, text: str, n_ctx: int = 512, progress: Callable[[int, int], None] | None = None
    ) -> tuple[int, float]:
        """Predictions scored and perplexity of a text; see `runtime/measure/perplexity.py`."""
        scored = await self._ask(Score(self._new_id(), text, n_ctx), Scored, progress)
        return scored.n_tokens, scored.ppl

    async def _ask(
        self,
        request: Request,
        kind: type[A],
        progress: Callable[[int, int], None] | None = None,
    ) -> A:
        """The answer to a request, which is of class `kind`."""
        child = await self._keeper.ready_child()
        try:
            with child.inbox(request.id) as inbox:
                await child.send(request)
                while not isinstance(answer := await inbox.get(), kind):
                    match answer:
                        case Failed(error=error):
                            raise error
                        case Progress(values=values) if progress is not None:
                            progress(*values)
                return answer
        except asyncio.CancelledError:
            with contextlib.suppress(EngineDied):
                await child.send(Cancel(request.id))
            raise
        finally:
            self._keeper.rest()

    def _new_id(self) -> str:
        return f"r{next(self._ids)}"


def _as_sent(prompt: Prompt) -> tuple[Message, ...] | RawPrompt:
    """A prompt as frames hold it."""
    return prompt if isinstance(prompt, RawPrompt) else tuple(prompt)
