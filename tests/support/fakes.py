"""A client without an engine: it plays scripted events, so faces are tested without llama.cpp."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from nanorun.model.chat import (
    Event,
    Finished,
    FinishReason,
    GenerateOptions,
    Message,
    ModelInfo,
    PrefillProgress,
    Prompt,
    PromptTokens,
    RawPrompt,
    TextDelta,
    ThinkingDelta,
    Timings,
    ToolArguments,
    ToolCall,
    ToolCallBegun,
    ToolCallDelta,
    Usage,
    arguments_text,
)
from nanorun.model.engine_options import EngineOptions
from nanorun.model.engine_state import EngineState
from nanorun.plan.shape import ModelShape, shape_of_recipe
from tests.model.known_archs import TINY_MOE

Step: TypeAlias = Event | float | asyncio.Event | Exception
"""An event to send, seconds to wait, a gate to wait for, or a failure to raise."""

MODEL_INFO = ModelInfo(
    name="pico",
    path="/models/pico.gguf",
    arch="nemotron_h_moe",
    n_params=3_600_000,
    file_bytes=7_300_000,
    n_vocab=512,
    n_layer=6,
    n_ctx=8192,
    n_ctx_train=1_048_576,
    n_seq_max=8,
    recipe="q8_0",
    load_s=0.1,
    device="CPU",
)


def fake_shape(name: str, path: Path) -> ModelShape:
    """Instead of `nanorun.cli.shapes.shape_of_file`: every file is a small model."""
    return shape_of_recipe(name, replace(TINY_MOE, n_ctx_train=1_048_576), "q8_0")


def reply(
    answer: str = "",
    *,
    thinking: str = "",
    tool_calls: Sequence[ToolCall] = (),
    reason: FinishReason | None = None,
    cached_tokens: int = 0,
    delay_s: float = 0.0,
) -> list[Step]:
    """The steps of a whole reply, a word at a time; every word counts as one token."""
    thoughts, words = _words(thinking), _words(answer)
    steps: list[Step] = [PrefillProgress(n_done=7, n_total=7, n_cached=cached_tokens)]
    steps += [ThinkingDelta(word) for word in thoughts]
    steps += [TextDelta(word) for word in words]
    for i, call in enumerate(tool_calls):
        steps.append(ToolCallBegun(index=i, id=call.id, name=call.name))
        steps += [ToolArguments(index=i, text=part) for part in _words(arguments_text(call))]
        steps.append(ToolCallDelta(index=i, call=call))
    if delay_s:
        steps = [step for event in steps for step in (delay_s, event)]
    usage = Usage(
        prompt_tokens=7,
        cached_tokens=cached_tokens,
        thinking_tokens=len(thoughts),
        completion_tokens=len(thoughts) + len(words) + len(tool_calls),
    )
    timings = Timings(prefill_s=0.1, decode_s=0.2, prefill_tps=70.0, decode_tps=50.0)
    end = reason or ("tool_calls" if tool_calls else "stop")
    return [*steps, Finished(end, usage=usage, timings=timings)]


def _words(text: str) -> list[str]:
    """The text in pieces that join to it again: `["one ", "two"]`."""
    pieces = text.split(" ")
    return [piece + " " for piece in pieces[:-1]] + pieces[-1:] if text else []


@dataclass
class FakeRequest:
    """What one `generate` was asked, and the generation that answered it."""

    messages: tuple[Message, ...]
    options: GenerateOptions
    generation: FakeGeneration
    raw: RawPrompt | None = None
    """The prompt, if it was none of messages."""


class FakeGeneration:
    """Plays one script. Like the real one, it ends after `Finished` and can be controlled."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = deque(steps)
        self._cancel = asyncio.Event()
        self._ended = False
        self.was_cancelled = False
        self.was_abandoned = False
        """Whether the reader's task was cancelled or the iterator closed before the end."""
        self.was_hurried = False
        self.budgets: list[int | None] = []
        self.sent: list[Event] = []

    def __aiter__(self) -> FakeGeneration:
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        try:
            return await self._next()
        except asyncio.CancelledError:
            self.was_abandoned = self._ended = True
            raise

    async def _next(self) -> Event:
        while self._steps and not self._cancel.is_set():
            event = await self._play(self._steps.popleft())
            if event is not None:
                self._ended = isinstance(event, Finished)
                self.sent.append(event)
                return event
        self._ended = True
        return Finished("cancelled" if self._cancel.is_set() else "stop")

    async def _play(self, step: Step) -> Event | None:
        if isinstance(step, Exception):
            self._ended = True
            raise step
        if isinstance(step, (int, float)):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._cancel.wait(), step)
            return None
        if isinstance(step, asyncio.Event):
            await self._either(step, self._cancel)
            return None
        return None if self.was_hurried and isinstance(step, ThinkingDelta) else step

    @staticmethod
    async def _either(*events: asyncio.Event) -> None:
        waiters = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiter in waiters:
                waiter.cancel()
            await asyncio.gather(*waiters, return_exceptions=True)

    async def aclose(self) -> None:
        self.was_abandoned = self.was_abandoned or not self._ended
        self._ended = True

    async def cancel(self) -> None:
        self.was_cancelled = True
        self._cancel.set()

    async def finish_thinking(self) -> None:
        self.was_hurried = True

    async def set_budget(self, n_tokens: int | None) -> None:
        self.budgets.append(n_tokens)


@dataclass
class FakeClient:
    """A `Client` that plays one script a request; the last one repeats."""

    scripts: list[list[Step]] = field(default_factory=lambda: [reply("hello")])
    model_info: ModelInfo = MODEL_INFO
    start_error: Exception | None = None
    start_delay_s: float = 0.0
    perplexity: float = 4.5
    requests: list[FakeRequest] = field(default_factory=list)
    n_starts: int = 0
    n_closes: int = 0
    options: EngineOptions = field(default_factory=EngineOptions)
    state: EngineState = field(default_factory=lambda: EngineState("ready", since=0.0))
    pid: int | None = None
    n_restarts: int = 0

    @classmethod
    def playing(cls, *scripts: list[Step], **options: Any) -> FakeClient:
        """A client that answers the first request with the first script, and so on."""
        return cls(scripts=list(scripts), **options)

    @property
    def info(self) -> ModelInfo:
        return self.model_info

    @property
    def last(self) -> FakeRequest:
        return self.requests[-1]

    async def start(self) -> ModelInfo:
        self.n_starts += 1
        if self.start_delay_s:
            await asyncio.sleep(self.start_delay_s)
        if self.start_error is not None:
            raise self.start_error
        return self.model_info

    async def close(self) -> None:
        self.n_closes += 1

    def generate(self, prompt: Prompt, options: GenerateOptions) -> FakeGeneration:
        raw = prompt if isinstance(prompt, RawPrompt) else None
        messages = () if isinstance(prompt, RawPrompt) else tuple(prompt)
        script = self.scripts[min(len(self.requests), len(self.scripts) - 1)]
        generation = FakeGeneration(script)
        self.requests.append(FakeRequest(messages, options, generation, raw))
        return generation

    async def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        return list(text.encode())

    async def pieces(self, tokens: Sequence[int], *, special: bool = True) -> list[bytes]:
        return [bytes([token]) for token in tokens]

    async def detokenize(self, tokens: Sequence[int], *, special: bool = True) -> str:
        return bytes(tokens).decode("utf-8", "replace")

    async def render(self, prompt: Prompt, options: GenerateOptions) -> PromptTokens:
        """A line for each message, or BOS (a "^") and the raw text; a byte is a token."""
        if isinstance(prompt, RawPrompt):
            text = f"^{prompt.text}"
        else:
            text = "".join(f"{message.role}: {message.content}\n" for message in prompt)
        return PromptTokens(text, tuple(text.encode()), (), thinks=False)

    async def count_tokens(self, prompt: Prompt, options: GenerateOptions) -> int:
        return len((await self.render(prompt, options)).tokens)

    async def score(
        self, text: str, n_ctx: int = 512, progress: Callable[[int, int], None] | None = None
    ) -> tuple[int, float]:
        if progress is not None:
            progress(1, 1)
        return len(text.split()), self.perplexity
