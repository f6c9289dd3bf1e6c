"""Which conversations' next turns are to be read ahead, once nothing else runs.

After a reply the next prompt is known but for its question. What of it is not in the cache yet (the
answer without the thinking before it, most often) is read while the engine has nothing else to do.
Any request ends that at once; it goes on when the engine is idle again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from nanorun.errors import NanorunError
from nanorun.model.chat import GenerateOptions, Message
from nanorun.model.reply_so_far import ReplySoFar
from nanorun.runtime.engine.request import Request, prepare_reading
from nanorun.runtime.llama.loaded_model import LoadedModel

_MOST_WAITING = 32
"""Conversations; of more, those that were told first have to wait for their next turn."""


@dataclass(slots=True)
class Turn:
    """A reply in the making, kept for reading ahead once it is complete."""

    messages: list[Message]
    options: GenerateOptions
    reply: ReplySoFar = field(default_factory=ReplySoFar)
    begun: Message = field(default_factory=lambda: Message("assistant"))
    """What the reply goes on with."""

    def next_replies(self) -> list[Message]:
        """The reply in the forms in which the next turn may carry it, the likelier last."""
        plain = Message("assistant", (self.begun.content + self.reply.answer).strip())
        thinking = (self.begun.thinking or "") + self.reply.thinking
        if not thinking or self.options.echo_thinking is False:
            return [plain]
        full = replace(plain, thinking=thinking)
        return [full] if self.options.echo_thinking else [plain, full]


def begin_turn(messages: list[Message], options: GenerateOptions) -> Turn:
    """The turn that a request asks for."""
    if options.continue_final:
        return Turn(messages[:-1], options, begun=messages[-1])
    return Turn(messages, options)


class ReadingAhead:
    """The turns that wait, and the one that is read."""

    def __init__(self) -> None:
        self._waiting: dict[str, Turn] = {}
        self._current: tuple[str, Turn] | None = None

    def add(self, request_id: str, turn: Turn) -> None:
        """A reply is complete."""
        self._waiting[request_id] = turn
        while len(self._waiting) > _MOST_WAITING:
            del self._waiting[next(iter(self._waiting))]

    def interrupt(self, messages: Sequence[Message]) -> str | None:
        """A request of these messages came: what was being read is read another time.

        The conversation that they continue has come to its next turn already.

        Returns:
            The name of what was being read, if anything was.
        """
        current, self._current = self._current, None
        if current is not None:
            self.add(*current)
        for request_id, turn in tuple(self._waiting.items()):
            if list(messages[: len(turn.messages)]) == turn.messages:
                del self._waiting[request_id]
        return current[0] if current is not None else None

    def next(self) -> tuple[str, Turn] | None:
        """What to read now that the engine is idle, the newest turn; None if none waits."""
        self._current = self._waiting.popitem() if self._waiting else None
        return self._current


def prepare_readings(
    request_id: str, model: LoadedModel, turn: Turn, check: Callable[[], None]
) -> list[Request]:
    """The requests that read a turn ahead; `check` may raise to end the work."""
    requests = []
    for reply in turn.next_replies():
        check()
        try:
            request = prepare_reading(request_id, model, turn.messages, reply, turn.options, check)
        except NanorunError:  # nobody asked for it, so nobody is told
            continue
        if request is not None:
            requests.append(request)
    return requests
