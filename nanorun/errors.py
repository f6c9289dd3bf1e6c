"""The errors nanorun expects, and the exit code each leaves the command line with.

    NanorunError                 1  failure
    ├── UsageError (ValueError)  2  a flag, a name or a request that makes no sense
    ├── ModelError (ValueError)  3  a model file or source model that cannot be used
    ├── MemoryPlanError          4  no plan fits the memory there is
    │   └── MemoryShortage          what is planned does not fit just now
    ├── EngineError              1  the engine refused, failed or died
    │   ├── EngineDied
    │   │   └── EngineOutOfMemory
    │   └── ContextFull
    ├── LibraryError             1  an optional part or a native library is missing
    └── SourceUnreachableError   1  what is read cannot be had just now
        └── SourceLostError      3  (a ModelError too) until someone does something about it

Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from signal import Signals

from nanorun.file_names import readable


class ExitCode(IntEnum):
    """What the process tells its caller."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    MODEL = 3
    MEMORY = 4
    INTERRUPTED = 130


class NanorunError(Exception):
    """An expected failure, worded for the person who meets it.

    Args:
        message: What went wrong, with the value and the file; lower case, no full stop.
        facts: Lines that explain it (sizes, what was expected, what was found).
        tries: Whole commands that would help.
    """

    exit_code = ExitCode.FAILURE
    retry_after_s: float | None = None
    """Seconds after which the same may succeed; None where it would fail again."""

    def __init__(
        self, message: str, *, facts: Sequence[str] = (), tries: Sequence[str] = ()
    ) -> None:
        self.message = readable(message)
        self.facts = tuple(map(readable, facts))
        self.tries = tuple(map(readable, tries))
        super().__init__(self.message)

    def render(self) -> str:
        """The message with its facts indented and its commands under `try:`."""
        lines = [self.message, *(f"  {fact}" for fact in self.facts)]
        lines += [f"  {'try:' if i == 0 else '    '} {t}" for i, t in enumerate(self.tries)]
        return "\n".join(lines)


class UsageError(NanorunError, ValueError):
    """A flag, name or request that cannot be meant."""

    exit_code = ExitCode.USAGE


class ModelError(NanorunError, ValueError):
    """A model file or a source model that is damaged, foreign or not supported."""

    exit_code = ExitCode.MODEL


class MemoryPlanError(NanorunError):
    """No combination of offload and context fits the free memory."""

    exit_code = ExitCode.MEMORY
    # Others give memory back, requests end; nothing is known of when.
    retry_after_s = 30.0


class MemoryShortage(MemoryPlanError):
    """What was planned does not fit the memory that is free just now, so nothing was loaded.

    Args:
        message: As `NanorunError`.
        facts: As `NanorunError`.
        tries: As `NanorunError`.
        retry_after_s: Seconds after which to try again.
    """

    def __init__(
        self,
        message: str,
        *,
        facts: Sequence[str] = (),
        tries: Sequence[str] = (),
        retry_after_s: float = 30.0,
    ) -> None:
        super().__init__(message, facts=facts, tries=tries)
        self.retry_after_s = retry_after_s


class EngineError(NanorunError, RuntimeError):
    """The engine refused a request or failed while it ran."""


class EngineDied(EngineError):
    """The engine's process ended while something waited for it."""

    retry_after_s = 1.0


class EngineOutOfMemory(EngineDied):
    """The engine's process ended because memory ran out."""


class ContextFull(EngineError):
    """A prompt that does not fit the context the model was opened with."""


class LibraryError(NanorunError, ImportError):
    """An optional dependency or a native library is missing or does not fit."""


class SourceUnreachableError(NanorunError):
    """A source that cannot be read just now; what was done with it so far stays good."""


class SourceLostError(SourceUnreachableError, ModelError):
    """A source that cannot be read until someone does something about it."""


def process_ending(code: int) -> str:
    """How a process ended, in the words of `EngineDied`, from the code that `wait` gave."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was ended by {name}"
