"""The sequences on the device, and the KV cells that they share.

All changes of the context's sequences go through here, so that the context, the tokens noted of it
and the count of its cells stay in agreement.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

from nanorun.runtime.prompt_state.archived_state import ArchivedState, StatePayload
from nanorun.runtime.prompt_state.branch import Branch
from nanorun.runtime.prompt_state.memory import SequenceMemory
from nanorun.runtime.prompt_state.spans import Node, Spans


class DeviceSequences:
    """Owns the sequences of a context.

    Args:
        memory: The engine's context.
        n_seq_max: Sequences it has.
        n_cells: KV cells it has.
    """

    def __init__(self, memory: SequenceMemory, n_seq_max: int, n_cells: int) -> None:
        self._memory = memory
        self._n_cells = n_cells
        self._free_ids = list(range(n_seq_max - 1, -1, -1))
        self._spans = Spans()
        self.branches: list[Branch] = []
        self.version = 0
        """Goes up when a prompt may find another place to start from, or other room. Growth of a
        running sequence does not count."""
        self.clock = 0
        """Goes up with each use of a sequence."""

    # -- beginnings and ends --------------------------------------------------------------------

    def begin(self) -> Branch | None:
        """A busy sequence without tokens; None while all are in use."""
        if not self._free_ids:
            return None
        self.version += 1
        branch = Branch(self._free_ids.pop(), self._spans.begin())
        self.branches.append(branch)
        return branch

    @property
    def can_begin(self) -> bool:
        """Whether a sequence is unused, or idle and could be evicted."""
        return bool(self._free_ids) or not all(branch.busy for branch in self.branches)

    def drop(self, branch: Branch) -> None:
        """Forget a sequence; cells that no other needs are free again."""
        self.version += 1
        self._memory.drop(branch.seq_id)
        self.branches.remove(branch)
        self._free_ids.append(branch.seq_id)
        self._spans.leave(branch.node)

    def fork(self, source: Branch, target: Branch, n_tokens: int) -> None:
        """Make an empty sequence the beginning of another, which has a state at that place."""
        if n_tokens == source.n_tokens:
            self._memory.fork(source.seq_id, target.seq_id)
        else:
            state = source.checkpoints[n_tokens]
            self._memory.fork_at(source.seq_id, target.seq_id, n_tokens, state)
        target.node = self._spans.move(target.node, self._spans.split(source.node, n_tokens))
        target.tokens = source.tokens[:n_tokens]
        target.checkpoints = _up_to(n_tokens, source.checkpoints)
        self.touch(source)

    def restore(self, branch: Branch, saved: ArchivedState, payload: StatePayload) -> None:
        """Fill an empty sequence from a saved state; there must be free cells for all of it.

        Raises:
            EngineError: If the context refuses the state; drop the sequence then.
        """
        self._memory.restore(branch.seq_id, payload.full)
        branch.node = self._spans.grow(branch.node, saved.n_tokens)
        branch.tokens = array("i", saved.tokens.tobytes())
        branch.checkpoints = dict(payload.checkpoints)
        branch.cached_from = saved.place
        self.touch(branch)

    # -- growth ---------------------------------------------------------------------------------

    def grow(self, branch: Branch, tokens: Sequence[int]) -> None:
        """Note tokens that were evaluated at a sequence's end."""
        branch.tokens.extend(tokens)
        branch.node = self._spans.grow(branch.node, len(tokens))
        self.touch(branch)

    def cut(self, branch: Branch, n_tokens: int) -> None:
        """Shorten a sequence to a checkpoint of its own."""
        self.version += 1
        self._memory.rewind(branch.seq_id, n_tokens, branch.checkpoints[n_tokens])
        branch.node = self._spans.move(branch.node, self._spans.split(branch.node, n_tokens))
        branch.tokens = branch.tokens[:n_tokens]
        branch.checkpoints = _up_to(n_tokens, branch.checkpoints)
        branch.n_cuts += 1
        branch.settled = True

    def settle(self, branch: Branch) -> None:
        """Make a pending rollback final."""
        if not branch.settled:
            self._memory.settle(branch.seq_id)
            branch.settled = True

    def touch(self, branch: Branch) -> None:
        """Note that a sequence was used."""
        self.clock += 1
        branch.last_used = self.clock

    # -- states ---------------------------------------------------------------------------------

    def recurrent_state(self, branch: Branch) -> bytes:
        """The recurrent state of a sequence's end."""
        return self._memory.recurrent_state(branch.seq_id)

    def payload(self, branch: Branch) -> StatePayload:
        """All that is needed to restore a sequence later."""
        return StatePayload(self._memory.full_state(branch.seq_id), dict(branch.checkpoints))

    # -- cells ----------------------------------------------------------------------------------

    @property
    def n_cells_used(self) -> int:
        """KV cells that sequences use, running or idle."""
        return self._spans.n_cells_used

    @property
    def n_cells_free(self) -> int:
        """KV cells that no sequence uses."""
        return self._n_cells - self.n_cells_used

    def n_cells_obtainable(self) -> int:
        """Free cells plus those that only idle sequences use."""
        return self._n_cells - sum(node.n_tokens for node in self._busy_nodes())

    def n_cells_shared(self, branch: Branch, n_tokens: int) -> int:
        """Cells of a sequence's first `n_tokens` that running sequences use."""
        busy = self._busy_nodes()
        shared = (node for node in branch.node.path() if node in busy)
        return sum(max(0, min(node.end, n_tokens) - node.start) for node in shared)

    def _busy_nodes(self) -> set[Node]:
        """The spans that running sequences pass through."""
        nodes: set[Node] = set()
        for branch in self.branches:
            if branch.busy:
                nodes.update(branch.node.path())
        return nodes


def _up_to(n_tokens: int, checkpoints: Mapping[int, bytes]) -> dict[int, bytes]:
    return {position: state for position, state in checkpoints.items() if position <= n_tokens}
