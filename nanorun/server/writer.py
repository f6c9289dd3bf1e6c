"""How a reply is said in the words of one API, whole or bit by bit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from nanorun.model.chat import Event, Finished, Notice, PrefillProgress, TextDelta, ToolCallDelta
from nanorun.model.reply_so_far import ReplySoFar
from nanorun.server import sse
from nanorun.server.errors import ApiError


class Writer(ABC):
    """One reply on its way out; made anew for each request.

    Args:
        n: Answers that the reply has.
        notices: What the person should know of how the request was taken.
    """

    media_type: ClassVar[str]
    id: str
    """The reply's id towards the client."""

    def __init__(self, n: int = 1, notices: Sequence[str] = ()) -> None:
        self.notices = list(notices)
        self.replies = [ReplySoFar() for _ in range(n)]

    def take(self, i_choice: int, event: Event) -> Event:
        """Add an event; a call that could not be read is text, as no client could make it."""
        if isinstance(event, ToolCallDelta) and not event.call.name:
            event = TextDelta(event.problem or "")
        if isinstance(event, Notice):
            self.notices.append(event.text)
        self.replies[i_choice].take(event)
        return event

    @property
    def n_unfinished(self) -> int:
        """Answers that have not ended."""
        return sum(reply.finished is None for reply in self.replies)

    def finished(self, i_choice: int = 0) -> Finished:
        """How an answer ended."""
        finished = self.replies[i_choice].finished
        assert finished is not None
        return finished

    @abstractmethod
    def opening(self) -> Iterable[bytes]:
        """What a stream begins with, sent when the engine has said the first thing."""

    @abstractmethod
    def write(self, i_choice: int, event: Event) -> Iterable[bytes]:
        """What a stream says of an event that was taken."""

    async def settle(self) -> None:
        """Do what must be done once every answer has finished and before its end is told."""
        return

    @abstractmethod
    def closing(self) -> Iterable[bytes]:
        """What a stream ends with once every answer has finished."""

    @abstractmethod
    def failure(self, error: ApiError) -> Iterable[bytes]:
        """What a stream ends with when it fails after it began."""

    @abstractmethod
    def pause(self, why: str) -> bytes:
        """What keeps a connection alive and is no part of the answer."""

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The reply as one object, once every answer has finished."""


class SseWriter(Writer):
    """A reply as server-sent events; what is not for the client's program is in comments."""

    media_type = sse.MEDIA_TYPE

    def write(self, i_choice: int, event: Event) -> Iterable[bytes]:
        """What a stream says of an event that was taken."""
        match event:
            case PrefillProgress(n_done=n_done, n_total=n_total):
                return [sse.comment(f"prompt {n_done} of {n_total} tokens")]
            case Notice(text):
                return [sse.comment(f"notice: {text}")]
            case _:
                return self.write_event(i_choice, event)

    @abstractmethod
    def write_event(self, i_choice: int, event: Event) -> Iterable[bytes]:
        """What a stream says of an event that is part of the reply."""

    def pause(self, why: str) -> bytes:
        """A comment."""
        return sse.comment(why)
