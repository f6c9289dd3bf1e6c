"""Conversations that changed since they were written to the disk."""

from __future__ import annotations

from nanorun.runtime.prompt_state.branch import Branch
from nanorun.runtime.prompt_state.prefix_tree import PrefixTree


class Unsaved:
    """Branches to be saved in idle time, the newest first.

    They go by the request that made them. Reading ahead goes by the name of its reply, and takes
    its place.

    Args:
        tree: Where the branches are.
    """

    def __init__(self, tree: PrefixTree) -> None:
        self._tree = tree
        self._branches: dict[str, Branch] = {}

    def __len__(self) -> int:
        return len(self._branches)

    def note(self, request_id: str, branch: Branch) -> None:
        """Remember a branch that a later turn may begin with; forget those that were evicted."""
        held = set(self._tree.branches)
        self._branches = {name: other for name, other in self._branches.items() if other in held}
        self._branches[request_id] = branch

    def save_one(self) -> None:
        """Begin to write one, unless one is being written."""
        if not self._tree.is_saving and (branch := self._next()):
            self._tree.save(branch)

    def save_all(self) -> None:
        """Write all, one after the other."""
        while branch := self._next():
            self._tree.save(branch)

    def _next(self) -> Branch | None:
        """Takes out the newest that is still held, and idle."""
        while self._branches:
            _, branch = self._branches.popitem()
            if branch in self._tree.branches and not branch.busy:
                return branch
        return None
