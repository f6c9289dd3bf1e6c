"""What the engine gives back when others need memory, and when it may take it again.

Pure decisions over readings that come about once a second. What is given back can be made again
(saved states of prompts): it costs time at most. It returns slowly, and only where all of it could
be used at once without making memory short again; each time that memory is short again soon, the
wait before it becomes longer. So two programs do not push each other to and fro.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanorun.runtime.process.machine_memory import MemoryNow

# Waiting for memory this much of the time, the machine has begun to stand still.
_STALLED = 0.1
# That share is of ten seconds: what was given back shows only then.
_STALL_EVERY_S = 10.0
_FIRST_WAIT_S = 30.0
_LONGEST_WAIT_S = 600.0
# What happened so long ago has nothing to do with what happens now.
_FORGOTTEN_AFTER_S = 1800.0
_STEP_EVERY_S = 10.0
_N_STEPS = 8


@dataclass(frozen=True, slots=True)
class Spare:
    """Host memory of what can be made again."""

    planned_bytes: int
    limit_bytes: int
    """What it may come to now."""
    held_bytes: int
    """What it came to when the limit was last changed."""


class Pressure:
    """Follows how memory stands.

    Memory is short when less than half of the cushion is left, since a load may use the other half.

    Args:
        cushion_bytes: What is to be left to other programs.
    """

    def __init__(self, cushion_bytes: int) -> None:
        self._cushion = cushion_bytes
        self.in_episode = False
        """Whether memory was short and not all is as planned again; people are told once."""
        self.is_short = False
        """Whether it is short now."""
        self.is_critical = False
        """Whether little is left before the kernel ends a process."""
        self._last_short_s = float("-inf")
        self._last_stall_s = float("-inf")
        self._last_step_s = 0.0
        self._wait_s = 0.0
        self._has_grown = False

    def update(self, memory: MemoryNow, spare: Spare, now_s: float) -> int:
        """Take a reading.

        Args:
            memory: How it stands.
            spare: What the engine holds.
            now_s: Seconds, as `time.monotonic`.

        Returns:
            Bytes to give back, below 0, or to allow again; 0 to leave all as it is.
        """
        is_ample = memory.free_bytes >= 2 * self._cushion
        is_stalled = memory.stalled >= _STALLED and not is_ample
        self.is_short = is_stalled or memory.free_bytes < self._cushion // 2
        self.is_critical = memory.free_bytes < self._cushion // 4
        if self.is_short and (not self.in_episode or self._has_grown):
            self._begin(now_s)
        if not self.in_episode:
            return 0
        missing = self._missing(memory, now_s, is_stalled=is_stalled)
        if self.is_short or missing > 0:
            self._last_short_s = now_s
            return -missing if spare.limit_bytes else 0
        return self._more(memory, spare, now_s)

    def _begin(self, now_s: float) -> None:
        is_again = now_s - self._last_short_s < _FORGOTTEN_AFTER_S
        self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S) if is_again else _FIRST_WAIT_S
        self.in_episode = True
        self._has_grown = False

    def _missing(self, memory: MemoryNow, now_s: float, *, is_stalled: bool) -> int:
        missing = max(0, self._cushion - memory.free_bytes)
        if is_stalled and now_s - self._last_stall_s >= _STALL_EVERY_S:
            self._last_stall_s = now_s
            return max(missing, self._cushion // 2)
        return missing

    def _more(self, memory: MemoryNow, spare: Spare, now_s: float) -> int:
        """What may be taken again, a step at a time."""
        if spare.limit_bytes >= spare.planned_bytes:
            self.in_episode = False
            return 0
        calm_s = now_s - self._last_short_s
        if calm_s < self._wait_s or now_s - self._last_step_s < _STEP_EVERY_S:
            return 0
        step = min(-(-spare.planned_bytes // _N_STEPS), spare.planned_bytes - spare.limit_bytes)
        unused = spare.limit_bytes - spare.held_bytes
        if memory.free_bytes - self._cushion < step + unused:
            return 0
        self._last_step_s = now_s
        self._has_grown = True
        return step
