"""What the chat, the server and the command line ask of whatever answers.

`runtime/client.py` has the local engine, `runtime/remote/` an endpoint on another machine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol, runtime_checkable

from nanorun.model.chat import Event, GenerateOptions, ModelInfo, Prompt, PromptTokens
from nanorun.model.engine_state import EngineState


class Client(Protocol):
    """Something that answers conversations: a local engine or a remote endpoint."""

    @property
    def info(self) -> ModelInfo | None:
        """What answers; None before `start`."""

    async def start(self) -> ModelInfo:
        """Load or reach the model; does nothing if that is done."""

    async def close(self) -> None:
        """End it."""

    def generate(self, prompt: Prompt, options: GenerateOptions) -> Generation:
        """Begin a reply to a conversation, or the text that follows a raw prompt."""


class TextClient(Client, Protocol):
    """A client that also says what texts and prompts are in the model's tokens."""

    async def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; `special` lets control-token texts become control tokens."""

    async def pieces(self, tokens: Sequence[int], *, special: bool = True) -> list[bytes]:
        """The bytes that each token stands for."""

    async def detokenize(self, tokens: Sequence[int], *, special: bool = True) -> str:
        """The text that tokens stand for."""

    async def render(self, prompt: Prompt, options: GenerateOptions) -> PromptTokens:
        """What the model would read of a prompt."""

    async def count_tokens(self, prompt: Prompt, options: GenerateOptions) -> int:
        """How many tokens that is."""


class LocalClient(TextClient, Protocol):
    """A client whose model is loaded, and unloaded, on this machine."""

    @property
    def state(self) -> EngineState:
        """What becomes of a request that comes now."""


@runtime_checkable
class LocalEngine(Protocol):
    """A client whose engine is a process of this machine."""

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""

    @property
    def n_restarts(self) -> int:
        """Processes that were started after one that died."""


class Generation(Protocol):
    """A reply in the making: iterate over its events, the last of which is `Finished`.

    Leaving the iteration early (`aclose`, or cancelling the task) cancels the reply.
    """

    def __aiter__(self) -> AsyncIterator[Event]: ...
    async def __anext__(self) -> Event: ...

    async def aclose(self) -> None:
        """Cancel the reply if it runs, and stop listening."""

    async def cancel(self) -> None:
        """End the reply; `Finished("cancelled")` follows."""

    async def finish_thinking(self) -> None:
        """Make it answer soon."""

    async def set_budget(self, n_tokens: int | None) -> None:
        """Change its thinking tokens; None for no limit."""
