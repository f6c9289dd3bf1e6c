"""Which sequence holds which tokens, and how a new prompt gets the longest prefix for nothing.

A sequence is a path in a tree of spans of evaluated tokens (`spans.py`), each backed by KV cells
once, however many sequences pass through it. Recurrent state cannot be cut, so a prompt can start
only where a state exists: at the end of a sequence, or at a checkpoint (a saved recurrent state of
an inner position). What falls out of the device goes to the archive (`state_archive.py`) and comes
back from there.

    root ── system+tools ──●── question 1 ──●── thinking, answer      ● checkpoint
                           └── question 1' ─●── ...
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from nanorun.errors import EngineError
from nanorun.runtime.prompt_state.archive import Archive, ArchivedState, StatePayload
from nanorun.runtime.prompt_state.spans import Node, Spans

Place = Literal["device", "host", "disk"]


class SequenceMemory(Protocol):
    """What the tree asks of the engine's context; see `runtime/llama/context.py`."""

    def drop(self, seq_id: int) -> None:
        """Forget a whole sequence."""

    def fork(self, source: int, target: int) -> None:
        """Copy a whole sequence into an empty one."""

    def fork_at(self, source: int, target: int, n_tokens: int, state: bytes) -> None:
        """Copy a sequence's beginning into an empty one, given the recurrent state of there."""

    def rewind(self, seq_id: int, n_tokens: int, state: bytes) -> None:
        """Shorten a sequence, given the recurrent state of there."""

    def settle(self, seq_id: int) -> None:
        """Make a rollback final; before, the sequence cannot be forked."""

    def recurrent_state(self, seq_id: int) -> bytes:
        """The recurrent state of a sequence's end."""

    def full_state(self, seq_id: int) -> bytes:
        """Everything of a sequence."""

    def restore(self, seq_id: int, state: bytes) -> None:
        """Fill an empty sequence from `full_state`."""


@dataclass(eq=False, slots=True)
class Branch:
    """A device sequence: its tokens so far, and the states saved along them."""

    seq_id: int
    node: Node
    """Where it ends in the tree of spans."""
    tokens: array[int] = field(default_factory=lambda: array("i"))
    checkpoints: dict[int, bytes] = field(default_factory=dict)
    """Position to recurrent state."""
    busy: bool = True
    last_used: int = 0
    n_cached: int = 0
    """Tokens it began with."""
    cached_from: Place = "device"
    settled: bool = True
    """Whether nothing was rolled back since the last evaluation."""

    @property
    def n_tokens(self) -> int:
        """Tokens evaluated in this sequence."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class _Match:
    """A place where a prompt can start: the first `n_tokens` of a holder."""

    n_tokens: int
    holder: Branch | ArchivedState | None
    state: bytes | None
    """The recurrent state of there; None at the holder's end."""

    @property
    def rank(self) -> tuple[int, bool, bool]:
        on_device = isinstance(self.holder, Branch)
        return (self.n_tokens, on_device, on_device and self.state is None)


class PrefixTree:
    """Owns the context's sequences.

    Args:
        memory: The engine's context.
        n_seq_max: Sequences it has.
        n_cells: KV cells it has.
        archive: Where evicted sequences go.
        checkpoint_bytes: Host memory for the recurrent states saved along the sequences.
    """

    def __init__(
        self,
        memory: SequenceMemory,
        n_seq_max: int,
        n_cells: int,
        archive: Archive,
        checkpoint_bytes: int = 2**30,
    ) -> None:
        self._memory = memory
        self._archive = archive
        self._n_cells = n_cells
        self._checkpoint_budget = checkpoint_bytes
        self._free_ids = list(range(n_seq_max - 1, -1, -1))
        self._spans = Spans()
        self._clock = 0
        self.branches: list[Branch] = []

    # -- prompts in -----------------------------------------------------------------------------

    def acquire(self, prompt: Sequence[int]) -> Branch | None:
        """A busy branch that already holds the longest usable prefix of `prompt`.

        At least the prompt's last token is left to evaluate, since its logits are wanted.

        Returns:
            The branch, or None while every sequence is in use.
        """
        branch = self._start(prompt)
        if branch is None:
            return None
        branch.busy = True
        branch.n_cached = branch.n_tokens
        self._touch(branch)
        return branch

    def best_match(self, prompt: Sequence[int]) -> _Match:
        """Where `prompt` can start with the least to evaluate."""
        wanted = np.asarray(prompt, np.int32)
        best = _Match(0, None, None)
        holders: Iterable[Branch | ArchivedState] = (*self.branches, *self._archive.entries)
        for holder in holders:
            match = _usable(holder, wanted)
            if match.n_tokens and match.rank > best.rank:
                best = match
        return best

    def _start(self, prompt: Sequence[int]) -> Branch | None:
        while True:
            match = self.best_match(prompt)
            if isinstance(match.holder, Branch):
                return self._continue(match.holder, match.n_tokens, match.state)
            if match.holder is None:
                return self._new_branch(keep=None)
            # Read before a sequence is made free: what that evicts may push it out of memory.
            payload = self._archive.read(match.holder)
            if payload is None:
                continue  # it is gone, and no match any more
            branch = self._new_branch(keep=None)
            if branch is None or self._recall(branch, match.holder, payload, match.n_tokens):
                return branch

    def _continue(self, holder: Branch, n_tokens: int, state: bytes | None) -> Branch | None:
        """Go on in an idle sequence, or fork a busy one or one whose tail is worth keeping."""
        if state is None and not holder.busy:
            holder.cached_from = "device"
            return holder
        branch = self._new_branch(keep=holder)
        if branch is None:
            if holder.busy or state is None:
                return None
            self._cut(holder, n_tokens, state)
            holder.cached_from = "device"
            return holder
        if state is None:
            self._memory.fork(holder.seq_id, branch.seq_id)
        else:
            self._memory.fork_at(holder.seq_id, branch.seq_id, n_tokens, state)
        branch.node = self._spans.move(branch.node, self._spans.split(holder.node, n_tokens))
        branch.tokens = holder.tokens[:n_tokens]
        branch.checkpoints = {p: s for p, s in holder.checkpoints.items() if p <= n_tokens}
        self._touch(holder)
        return branch

    def _recall(
        self, branch: Branch, saved: ArchivedState, payload: StatePayload, n_tokens: int
    ) -> bool:
        """Bring the first `n_tokens` of an archived sequence back, if there is room for all of it.

        Returns:
            False if the engine refuses the state; both it and the branch are gone then.
        """
        if not self.make_room(saved.n_tokens, keep=branch):
            return True
        try:
            self._memory.restore(branch.seq_id, payload.full)
        except EngineError:
            self._archive.forget(saved)
            self._drop(branch)
            return False
        branch.node = self._spans.grow(branch.node, saved.n_tokens)
        branch.tokens = array("i", saved.tokens.tobytes())
        branch.checkpoints = dict(payload.checkpoints)
        branch.cached_from = saved.place
        if n_tokens < saved.n_tokens:
            self._cut(branch, n_tokens, payload.checkpoints[n_tokens])
        self._touch(branch)
        self._trim_checkpoints()
        return True

    # -- progress -------------------------------------------------------------------------------

    def extend(self, branch: Branch, tokens: Sequence[int], *, settled: bool = True) -> None:
        """Note tokens that were evaluated at the end of a branch.

        Args:
            branch: The branch.
            tokens: What was added.
            settled: Whether nothing was rolled back behind them.
        """
        branch.settled = settled
        branch.tokens.extend(tokens)
        branch.node = self._spans.grow(branch.node, len(tokens))
        self._touch(branch)

    def checkpoint(self, branch: Branch) -> None:
        """Save the recurrent state of a branch's end; others give way when the budget is spent."""
        position = branch.n_tokens
        if not position or position in branch.checkpoints:
            return
        state = self._memory.recurrent_state(branch.seq_id)
        if len(state) > self._checkpoint_budget:
            return
        branch.checkpoints[position] = state
        self._trim_checkpoints()

    def _trim_checkpoints(self) -> None:
        while self.checkpoint_bytes > self._checkpoint_budget:
            oldest = min((b for b in self.branches if b.checkpoints), key=lambda b: b.last_used)
            del oldest.checkpoints[min(oldest.checkpoints)]

    @property
    def checkpoint_bytes(self) -> int:
        """Host memory of all saved states; forks share theirs."""
        states = {id(s): len(s) for b in self.branches for s in b.checkpoints.values()}
        return sum(states.values())

    @property
    def archive_bytes(self) -> int:
        """Host memory of the sequences that left the device."""
        return self._archive.host_bytes

    def cut_to_checkpoint(self, branch: Branch) -> bool:
        """Shorten a busy branch, whose evaluation was broken off, to its last saved state.

        Returns:
            False if there is none; then the branch is of no more use.
        """
        position = max(branch.checkpoints, default=0)
        if position:
            self._cut(branch, position, branch.checkpoints[position])
            branch.settled = True
        return position > 0

    def release(self, branch: Branch, *, keep: bool = True) -> None:
        """Give a branch back: kept idle for later prompts, or dropped."""
        branch.busy = False
        if not branch.settled and keep:
            self._memory.settle(branch.seq_id)
            branch.settled = True
        if not keep or not branch.n_tokens:
            self._drop(branch)

    # -- room -----------------------------------------------------------------------------------

    @property
    def n_cells_used(self) -> int:
        """KV cells that sequences use, running or idle."""
        return self._spans.n_cells_used

    @property
    def n_cells_free(self) -> int:
        """KV cells no sequence uses."""
        return self._n_cells - self.n_cells_used

    def make_room(self, n_cells: int, keep: Branch | None = None) -> bool:
        """Evict idle sequences until `n_cells` are free; False if that is not possible."""
        while self.n_cells_free < n_cells:
            victim = self._cheapest_idle(keep)
            if victim is None:
                return False
            self._evict(victim)
        return True

    def n_cells_obtainable(self) -> int:
        """Free cells plus those that only idle sequences use."""
        return self._n_cells - sum(node.n_tokens for node in self._busy_nodes())

    def n_cells_needed(self, prompt: Sequence[int]) -> int:
        """Cells a prompt takes beyond those that running sequences hold for it already."""
        match = self.best_match(prompt)
        if not isinstance(match.holder, Branch):
            return len(prompt)
        busy = self._busy_nodes()
        shared = (node for node in match.holder.node.path() if node in busy)
        n_shared = sum(max(0, min(node.end, match.n_tokens) - node.start) for node in shared)
        return len(prompt) - n_shared

    def _busy_nodes(self) -> set[Node]:
        """The spans that running sequences pass through."""
        nodes: set[Node] = set()
        for branch in self.branches:
            if branch.busy:
                nodes.update(branch.node.path())
        return nodes

    def evict_idle(self) -> None:
        """Move every idle sequence to the archive."""
        for branch in [b for b in self.branches if not b.busy]:
            self._evict(branch)

    @property
    def is_saving(self) -> bool:
        """Whether a sequence is on its way to the disk."""
        return self._archive.is_writing

    def drop_idle(self) -> None:
        """Forget every idle sequence of the device, whose state is in doubt."""
        for branch in [b for b in self.branches if not b.busy]:
            self._drop(branch)

    def close(self) -> None:
        """Wait until what is to be saved is on disk."""
        self._archive.close()

    def _cheapest_idle(self, keep: Branch | None) -> Branch | None:
        """The idle branch whose loss costs least: few tokens of its own, long unused."""
        idle = [b for b in self.branches if not b.busy and b is not keep]
        return min(idle, key=self._worth, default=None)

    def _worth(self, branch: Branch) -> float:
        return branch.n_tokens / (1 + self._clock - branch.last_used)

    def _evict(self, branch: Branch) -> None:
        state = self._describe(branch)
        others = (self._describe(other) for other in self.branches if other is not branch)
        is_covered = any(other.makes_useless(state) for other in others)
        if not is_covered and self._archive.wants(state):
            self._archive.put(state, self._payload(branch))
        self._drop(branch)

    def save(self, branch: Branch) -> None:
        """Write an idle branch to the store, where it outlives the process."""
        state = self._describe(branch)
        if self._archive.is_to_write(state):
            self._archive.save(state, self._payload(branch))

    def _describe(self, branch: Branch) -> ArchivedState:
        tokens = np.frombuffer(branch.tokens, np.int32).copy()
        return ArchivedState(tokens, checkpoint_positions=frozenset(branch.checkpoints))

    def _payload(self, branch: Branch) -> StatePayload:
        return StatePayload(self._memory.full_state(branch.seq_id), dict(branch.checkpoints))

    # -- bookkeeping ----------------------------------------------------------------------------

    def _new_branch(self, keep: Branch | None) -> Branch | None:
        if not self._free_ids:
            victim = self._cheapest_idle(keep)
            if victim is None:
                return None
            self._evict(victim)
        branch = Branch(self._free_ids.pop(), self._spans.begin())
        self.branches.append(branch)
        return branch

    def _drop(self, branch: Branch) -> None:
        self._memory.drop(branch.seq_id)
        self.branches.remove(branch)
        self._free_ids.append(branch.seq_id)
        self._spans.leave(branch.node)

    def _cut(self, branch: Branch, n_tokens: int, state: bytes) -> None:
        """Shorten an idle or fresh branch to a checkpoint of its own."""
        self._memory.rewind(branch.seq_id, n_tokens, state)
        branch.node = self._spans.move(branch.node, self._spans.split(branch.node, n_tokens))
        branch.tokens = branch.tokens[:n_tokens]
        branch.checkpoints = {p: s for p, s in branch.checkpoints.items() if p <= n_tokens}

    def _touch(self, branch: Branch) -> None:
        self._clock += 1
        branch.last_used = self._clock


def _usable(holder: Branch | ArchivedState, wanted: np.ndarray) -> _Match:
    held = np.frombuffer(holder.tokens, np.int32) if isinstance(holder, Branch) else holder.tokens
    n_common = _n_common(held, wanted)
    limit = min(n_common, len(wanted) - 1)
    if isinstance(holder, Branch) and not holder.settled:
        return _Match(0, None, None)
    if n_common == len(held) and 0 < n_common <= limit:
        return _Match(n_common, holder, None)
    if isinstance(holder, Branch):
        position = max((p for p in holder.checkpoints if p <= limit), default=0)
        return _Match(position, holder, holder.checkpoints.get(position))
    position = max((p for p in holder.checkpoint_positions if p <= limit), default=0)
    return _Match(position, holder, None)


def _n_common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix of two token arrays."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
