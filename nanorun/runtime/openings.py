"""How the engine's next process is opened: as planned, smaller, or not at all just now.

A model that does not fit is never loaded to find that out: the kernel would end some process, most
likely this one, and until then the whole machine stands still.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from nanorun.errors import EngineOutOfMemory, NanorunError
from nanorun.model.engine_options import EngineOptions
from nanorun.model.main_memory import MainMemory, read_main_memory
from nanorun.model.memory_needs import MemoryNeeds
from nanorun.runtime.process.back_off import BackOff
from nanorun.runtime.process.shortage import headline, ran_out_repeatedly, shortage

log = logging.getLogger(__name__)


class Openings:
    """The ways to open a model, the wished one first, and what is known of memory.

    Args:
        options: How it is wished.
        smaller: What to try, one after the other, when memory runs out or does not suffice:
            options, and what they change in words.
        needs: What each takes of main memory.
        read: Tells what there is.
        back_off: Counts failures.
    """

    def __init__(
        self,
        options: EngineOptions,
        smaller: Sequence[tuple[EngineOptions, str]] = (),
        needs: MemoryNeeds | None = None,
        *,
        read: Callable[[], MainMemory] | None = None,
        back_off: BackOff | None = None,
    ) -> None:
        self._choices = [(options, ""), *smaller]
        self._needs = needs or MemoryNeeds()
        self._read = read or read_main_memory
        self._back_off = back_off or BackOff()
        self._lost: list[str] = []
        """What was given up since the model was last opened."""
        self.options = options
        """How it was opened last, or is going to be."""
        self.notices: list[str] = []
        """What the person should know before the next reply."""

    def next(self) -> EngineOptions:
        """How to open the model now: the first way that fits.

        Raises:
            MemoryShortage: If none does, or if memory ran out too often of late.
        """
        wait_s = self._back_off.wait_s()
        if wait_s > 0:
            raise ran_out_repeatedly(self._back_off.n_failures, wait_s)
        memory = self._memory()
        i = self._first_that_fits(memory)
        if i is None:
            assert memory is not None
            raise shortage(self._least_need(), memory, self._needs)
        self._tell_what_is_less(self._choices[1 : i + 1])
        self.options = self._choices[i][0]
        return self.options

    def failed(self, error: NanorunError, *, while_loading: bool = False) -> bool:
        """Note that memory ran out; the next way to open the model is a smaller one.

        Args:
            error: What happened.
            while_loading: Whether the engine had not answered anything yet, so that less room for
                saved prompts would be no help.

        Returns:
            Whether there is a smaller one.
        """
        i_failed = next(i for i, (way, _) in enumerate(self._choices) if way == self.options)
        n_bytes = self._needs.of(self.options)
        rest = self._choices[i_failed + 1 :]
        was_killed = isinstance(error, EngineOutOfMemory)
        while rest and was_killed and while_loading and 0 < n_bytes <= self._needs.of(rest[0][0]):
            self._lost.append(rest.pop(0)[1])
        if was_killed or not rest:
            self._back_off.failed()
        if not rest:
            self._lost.clear()
            return False
        self._choices = rest
        self._lost.append(rest[0][1])
        self.options = rest[0][0]
        log.info("memory ran out: %s", error.message)
        return True

    def obstacle(self) -> str | None:
        """Why the model cannot be opened now; None if it can."""
        wait_s = self._back_off.wait_s()
        if wait_s > 0:
            return ran_out_repeatedly(self._back_off.n_failures, wait_s).message
        memory = self._memory()
        if memory is None or self._first_that_fits(memory) is not None:
            return None
        return headline(self._least_need(), memory, self._needs)

    def _memory(self) -> MainMemory | None:
        return self._read() if self._needs.planned_bytes else None

    def _first_that_fits(self, memory: MainMemory | None) -> int | None:
        if memory is None:
            return 0
        # What is free goes up and down all the time, so half of the cushion may be missing.
        most = memory.available_bytes - self._needs.leave_bytes // 2
        fitting = (i for i, (way, _) in enumerate(self._choices) if self._needs.of(way) <= most)
        return next(fitting, None)

    def _least_need(self) -> int:
        return min(self._needs.of(way) for way, _ in self._choices)

    def tell(self, notice: str) -> None:
        """Note something that the person should know before the next reply."""
        log.info("%s", notice)
        self.notices.append(notice)

    def _tell_what_is_less(self, skipped: Sequence[tuple[EngineOptions, str]]) -> None:
        changes = [*self._lost, *(change for _, change in skipped)]
        if not changes:
            return
        why = "memory ran out" if self._lost else "other programs take memory"
        self._lost.clear()
        notice = f"{why}, so the model was opened smaller: {', then '.join(changes)}"
        self.tell(notice)
