"""Spans of tokens that sequences share, and the KV cells they take: arithmetic, no engine.

A node is a span `[start, end)` of the paths from the root that pass through it, and its cells are
there once, however many sequences do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Node:
    """A span of tokens `[start, end)` of the paths that pass through it."""

    parent: Node | None
    start: int
    end: int
    n_users: int = 0
    """Child nodes and sequences that need this span."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the span."""
        return self.end - self.start

    def path(self) -> Iterator[Node]:
        """This node and all above it."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent


class Spans:
    """The tree of spans; each sequence stands at the node where it ends."""

    def __init__(self) -> None:
        self.n_cells_used = 0
        self._root = Node(None, 0, 0, n_users=1)

    def begin(self) -> Node:
        """Where a sequence without tokens stands."""
        self._root.n_users += 1
        return self._root

    def leave(self, node: Node | None) -> None:
        """A sequence stands there no more: spans that nobody else needs give their cells back."""
        while node is not None:
            node.n_users -= 1
            if node.n_users:
                return
            self.n_cells_used -= node.n_tokens
            node = node.parent

    def move(self, node: Node, to: Node) -> Node:
        """A sequence that stood at `node` stands at `to`, which is returned."""
        to.n_users += 1
        self.leave(node)
        return to

    def grow(self, node: Node, n_tokens: int) -> Node:
        """Lengthen a sequence by tokens of its own; where it stands then.

        A span that others need too gets a child.
        """
        if node.n_users > 1 or node is self._root:
            # The sequence's use of the old node is now the child's.
            node = Node(node, node.end, node.end, n_users=1)
        node.end += n_tokens
        self.n_cells_used += n_tokens
        return node

    def split(self, node: Node, n_tokens: int) -> Node:
        """The node on the path to `node` that ends exactly at `n_tokens`, split off if need be."""
        while node.parent is not None and node.start >= n_tokens:
            node = node.parent
        if node.end == n_tokens:
            return node
        upper = Node(node.parent, node.start, n_tokens, n_users=1)
        node.parent, node.start = upper, n_tokens
        return upper
