"""How a new prompt gets the longest prefix for nothing.

A sequence is a path in a tree of spans of evaluated tokens (`spans.py`), each backed by KV cells
once, however many sequences pass through it. Recurrent state cannot be cut, so a prompt can start
only where a state exists: at the end of a sequence, or at a checkpoint (a saved recurrent state of
an inner position). What falls out of the device (`eviction.py`) goes to the archive (`archive.py`)
and comes back from there.

    root ── system+tools ──●── question 1 ──●── thinking, answer      ● checkpoint
                           └── question 1' ─●── ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter

import numpy as np

from nanorun.runtime.prompt_state.archive import Archive
from nanorun.runtime.prompt_state.archived_state import ArchivedState
from nanorun.runtime.prompt_state.branch import ArchivedPlace, Branch, Match
from nanorun.runtime.prompt_state.eviction import Eviction
from nanorun.runtime.prompt_state.memory import SequenceMemory
from nanorun.runtime.prompt_state.prefixes import Tokens, n_common, prefix_hashes
from nanorun.runtime.prompt_state.sequences import DeviceSequences


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
        self._archive = archive
        self._sequences = DeviceSequences(memory, n_seq_max, n_cells)
        self._eviction = Eviction(self._sequences, archive)
        self._checkpoint_budget = checkpoint_bytes
        self._spare_limit = self.planned_spare_bytes

    @property
    def branches(self) -> Sequence[Branch]:
        """The sequences on the device, running or idle."""
        return self._sequences.branches

    # -- prompts in -----------------------------------------------------------------------------

    def best_match(self, prompt: Tokens, known: Match | None = None) -> Match:
        """Where `prompt` can start with the least to evaluate.

        At least the prompt's last token is left, since its logits are wanted.

        Args:
            prompt: Token ids, shape `(n_tokens,)`; not to be changed afterwards.
            known: What was found for the same array before. It is returned again as long as
                nothing changed but the ends of running sequences, so that asking in every step
                costs nothing.
        """
        if known is not None and known.prompt is not prompt:
            known = None
        if known is not None and known.version == self._sequences.version:
            return known
        if known is None:
            hashes = prefix_hashes(prompt)
            known = Match(prompt, hashes, -1, 0, None, {}, ArchivedPlace(()))
        found = replace(known, archived=self._find_archived(known))
        on_device = self._match_on_device(found)
        if found.archived.n_tokens <= on_device.n_tokens:
            return on_device
        return replace(on_device, holder=found.archived.entry, n_tokens=found.archived.n_tokens)

    def _find_archived(self, known: Match) -> ArchivedPlace:
        version = self._archive.version
        if known.archived.version == version:
            return known.archived
        prompt = known.prompt
        found = self._archive.longest(prompt, known.hashes, len(prompt) - 1)
        if found is None:
            return ArchivedPlace(version)
        entry, n_tokens = found
        return ArchivedPlace(version, entry, n_tokens, n_common(entry.tokens, prompt))

    def _match_on_device(self, known: Match) -> Match:
        """A match on the device; what was known of the prompt is brought up to date."""
        prompt, shared = known.prompt, {}
        best, n_best = None, 0
        for branch in self.branches:
            shared[branch] = branch.compare(prompt, known.shared.get(branch))
            n_tokens = branch.farthest_place(min(shared[branch].n_common, len(prompt) - 1))
            # To go on at a sequence's end is cheaper than to start from a checkpoint of another.
            is_end = best is not None and branch.n_tokens == n_tokens == n_best < best.n_tokens
            if n_tokens > n_best or is_end:
                best, n_best = branch, n_tokens
        version = self._sequences.version
        return replace(known, version=version, n_tokens=n_best, holder=best, shared=shared)

    def acquire(self, match: Match) -> Branch | None:
        """A busy sequence that begins with what was matched.

        Returns:
            The sequence, or None while all are in use.
        """
        branch = self._start(self._confirmed(match))
        if branch is not None:
            branch.busy = True
            branch.n_cached = branch.n_tokens
            self._sequences.version += 1
            self._sequences.touch(branch)
            self._trim()
        return branch

    def _confirmed(self, match: Match) -> Match:
        """A match that still holds: a running sequence may have grown past it meanwhile."""
        holder = match.holder
        if isinstance(holder, Branch) and match.version == self._sequences.version:
            is_place = match.n_tokens == holder.n_tokens or match.n_tokens in holder.checkpoints
            if not (is_place and holder.settled):
                return self.best_match(match.prompt)
        return self.best_match(match.prompt, match)

    def _start(self, match: Match) -> Branch | None:
        while isinstance(saved := match.holder, ArchivedState):
            if saved.n_tokens > self.n_cells_obtainable():
                match = self._match_on_device(match)
            elif not self._sequences.can_begin:
                return None
            elif branch := self._eviction.recall(saved, match.n_tokens):
                return branch
            else:  # it is gone, and no match any more
                match = self.best_match(match.prompt)
        if saved is None:
            return self._eviction.begin()
        return self._continue(saved, match.n_tokens)

    def _continue(self, holder: Branch, n_tokens: int) -> Branch | None:
        """Go on in an idle sequence, or fork a busy one or one whose tail is worth keeping."""
        goes_on = not holder.busy and n_tokens == holder.n_tokens
        branch = holder if goes_on else self._eviction.begin(keep=holder)
        if branch is None and not holder.busy:
            self._sequences.cut(holder, n_tokens)
            branch = holder
        if branch is not None and branch is not holder:
            self._sequences.fork(holder, branch, n_tokens)
        if branch is holder:
            branch.cached_from = "device"
        return branch

    # -- progress -------------------------------------------------------------------------------

    def extend(self, branch: Branch, tokens: Sequence[int], *, settled: bool = True) -> None:
        """Note tokens that were evaluated at the end of a branch.

        Args:
            branch: The branch.
            tokens: What was added.
            settled: Whether nothing was rolled back behind them.
        """
        branch.settled = settled
        self._sequences.grow(branch, tokens)

    def checkpoint(self, branch: Branch) -> None:
        """Save the recurrent state of a branch's end; others give way when the budget is spent."""
        self._sequences.version += 1
        position = branch.n_tokens
        if not position or position in branch.checkpoints:
            return
        state = self._sequences.recurrent_state(branch)
        if len(state) > min(self._checkpoint_budget, self._spare_limit):
            return
        branch.checkpoints[position] = state
        self._trim()

    def keep_prefix(self, branch: Branch, n_tokens: int) -> None:
        """Keep what a branch and other conversations begin with, longer than all else.

        A branch that ends there is written to the store; of one that goes on it is noted that the
        prefix was used.

        Args:
            branch: A busy branch.
            n_tokens: Length of the prefix.
        """
        branch.n_prefix = n_tokens
        if branch.n_tokens == n_tokens:
            self.checkpoint(branch)
            self._eviction.save_prefix(branch)
        else:
            self._eviction.touch_prefix(np.frombuffer(branch.tokens, np.int32)[:n_tokens])

    def _trim(self) -> None:
        """Drop checkpoints beyond the budget: the least recently used, those of prefixes last.

        While less than the plan may be held, checkpoints, which are of sequences in use, go before
        the sequences that left the device.
        """
        while self.checkpoint_bytes > min(self._checkpoint_budget, self._spare_limit):
            places = [
                (position == branch.n_prefix, branch.last_used, position, branch)
                for branch in self.branches
                for position in branch.checkpoints
            ]
            *_, position, branch = min(places, key=itemgetter(0, 1, 2))
            del branch.checkpoints[position]
        self._archive.limit(self._spare_limit - self.checkpoint_bytes)

    def cut_to_checkpoint(self, branch: Branch) -> bool:
        """Shorten a busy branch, whose evaluation was broken off, to its last saved state.

        Returns:
            False if there is none; then the branch is of no more use.
        """
        position = max(branch.checkpoints, default=0)
        if position:
            self._sequences.cut(branch, position)
        return position > 0

    def release(self, branch: Branch, *, keep: bool = True) -> None:
        """Give a branch back: kept idle for later prompts, or dropped."""
        self._sequences.version += 1
        branch.busy = False
        if keep and branch.n_tokens:
            self._sequences.settle(branch)
        else:
            self._sequences.drop(branch)

    def drop_idle(self) -> None:
        """Forget every idle sequence of the device, whose state is in doubt."""
        for branch in [b for b in self.branches if not b.busy]:
            self._sequences.drop(branch)

    # -- room -----------------------------------------------------------------------------------

    @property
    def n_cells_used(self) -> int:
        """KV cells that sequences use, running or idle."""
        return self._sequences.n_cells_used

    @property
    def n_cells_free(self) -> int:
        """KV cells that no sequence uses."""
        return self._sequences.n_cells_free

    def n_cells_obtainable(self) -> int:
        """Free cells plus those that only idle sequences use."""
        return self._sequences.n_cells_obtainable()

    def n_cells_needed(self, match: Match) -> int:
        """Cells a prompt takes beyond those that running sequences hold for it already."""
        if not isinstance(match.holder, Branch):
            return len(match.prompt)
        return len(match.prompt) - self._sequences.n_cells_shared(match.holder, match.n_tokens)

    def make_room(self, n_cells: int) -> bool:
        """Evict idle sequences until `n_cells` are free; False if that is not possible."""
        return self._eviction.make_room(n_cells)

    @property
    def checkpoint_bytes(self) -> int:
        """Host memory of all saved states; forks share theirs."""
        states = {id(s): len(s) for b in self.branches for s in b.checkpoints.values()}
        return sum(states.values())

    @property
    def archive_bytes(self) -> int:
        """Host memory of the sequences that left the device."""
        return self._archive.host_bytes

    @property
    def planned_spare_bytes(self) -> int:
        """Host memory that both may take when there is plenty."""
        return self._checkpoint_budget + self._archive.planned_bytes

    @property
    def spare_bytes(self) -> int:
        """Host memory of both: what can be made again."""
        return self.checkpoint_bytes + self.archive_bytes

    @property
    def spare_limit_bytes(self) -> int:
        """What `spare_bytes` may come to."""
        return self._spare_limit

    def limit_spare(self, n_bytes: int) -> None:
        """Hold no more than that of what can be made again, within the plan; the oldest goes."""
        self._sequences.version += 1
        self._spare_limit = max(0, min(n_bytes, self.planned_spare_bytes))
        self._trim()

    # -- disk -----------------------------------------------------------------------------------

    def save(self, branch: Branch) -> None:
        """Write an idle branch to the store, where it outlives the process."""
        self._eviction.save(branch)

    @property
    def is_saving(self) -> bool:
        """Whether a sequence is on its way to the disk."""
        return self._archive.is_writing

    def close(self) -> None:
        """Wait until what is to be saved is on disk."""
        self._archive.close()
