"""How much memory ggml's graph allocator takes for a graph: the rules of ggml-alloc.c.

The engine gives the tensors of one evaluation places in a single buffer, reuses a place as soon as
its last reader has run, and writes some results over their input. What a buffer must hold at worst
follows from the order of the operations alone, so it can be known without an engine. This module
knows graphs, not models; `compute_graph` builds the graphs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

ALIGNMENT = 32
"""Of tensors in host memory (ggml-backend.cpp)."""
# The last free block reaches to the end of the address space.
_ENDLESS = 2**62


@dataclass(eq=False, slots=True)
class Node:
    """A tensor of the graph: an input, the result of an operation, or a view of either."""

    n_bytes: int
    inputs: tuple[Node, ...] = ()
    view_of: Node | None = None
    layout: tuple[int, ...] = ()
    """Equal for tensors of the same type, shape and strides; empty for a layout of its own."""
    in_place: bool = False
    """Whether the operation may write its result over an input of the same layout."""
    is_external: bool = False
    """Weights and caches, which have buffers of their own."""
    is_output: bool = False
    """Read after the evaluation, so never freed or written over."""

    # What the allocator keeps about it while it walks.
    n_readers: int = 0
    n_views: int = 0
    is_placed: bool = False
    offset: int = 0

    def view(self, layout: tuple[int, ...] = ()) -> Node:
        """The same memory under another shape."""
        root = self.view_of or self
        return Node(0, (self,), view_of=root, layout=layout, is_external=root.is_external)


@dataclass(slots=True)
class Graph:
    """Operations in the order in which they run, each after what it reads."""

    inputs: list[Node] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)

    def expand(self, *results: Node) -> None:
        """Add everything that `results` need and is not there yet, depth first."""
        for result in results:
            self._visit(result)

    def _visit(self, node: Node) -> None:
        # Its own stack: a graph is thousands of operations deep.
        stack = [(node, iter(node.inputs))]
        if id(node) in self._seen:
            return
        self._seen.add(id(node))
        while stack:
            current, rest = stack[-1]
            following = next((n for n in rest if id(n) not in self._seen), None)
            if following is not None:
                self._seen.add(id(following))
                stack.append((following, iter(following.inputs)))
                continue
            stack.pop()
            is_leaf = not current.inputs and current.view_of is None
            (self.inputs if is_leaf else self.nodes).append(current)


def buffer_bytes(graph: Graph, alignment: int = ALIGNMENT) -> int:
    """Bytes of the buffer in which all tensors of the graph find a place."""
    return _Allocator(alignment).run(graph)


class _FreeList:
    """Free ranges of the buffer, sorted by offset; the last one is endless."""

    def __init__(self, alignment: int) -> None:
        self._alignment = alignment
        self._blocks: list[list[int]] = [[0, _ENDLESS]]
        self.high_water = 0

    def padded(self, n_bytes: int) -> int:
        return -(-n_bytes // self._alignment) * self._alignment

    def take(self, n_bytes: int) -> int:
        size = self.padded(n_bytes)
        best = len(self._blocks) - 1
        best_size = _ENDLESS + 1
        for i, (_, free) in enumerate(self._blocks[:-1]):
            if size <= free <= best_size:
                best, best_size = i, free
        block = self._blocks[best]
        offset = block[0]
        block[0] += size
        block[1] -= size
        if block[1] == 0:
            del self._blocks[best]
        self.high_water = max(self.high_water, offset + size)
        return offset

    def give(self, offset: int, n_bytes: int) -> None:
        size = self.padded(n_bytes)
        if not size:
            return
        i = next(i for i, block in enumerate(self._blocks) if block[0] > offset)
        self._blocks.insert(i, [offset, size])
        for j in (i, i - 1):
            if j >= 0 and self._blocks[j][0] + self._blocks[j][1] == self._blocks[j + 1][0]:
                self._blocks[j][1] += self._blocks[j + 1][1]
                del self._blocks[j + 1]


class _Allocator:
    def __init__(self, alignment: int) -> None:
        self._free = _FreeList(alignment)

    def run(self, graph: Graph) -> int:
        for node in graph.inputs:
            self._place(node)
        self._count_readers(graph.nodes)
        for node in graph.nodes:
            self._place(node)
            for parent in node.inputs:
                parent.n_readers -= 1
                self._release(parent)
        return self._free.high_water

    @staticmethod
    def _count_readers(nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node.view_of is not None:
                node.view_of.n_views += 1
            for parent in node.inputs:
                parent.n_readers += 1

    def _place(self, node: Node) -> None:
        if node.is_external or node.view_of is not None:
            return
        node.is_placed = True
        if node.in_place:
            for parent in node.inputs:
                if self._may_replace(node, parent):
                    parent.is_placed = False
                    node.offset = parent.offset
                    return
        node.offset = self._free.take(node.n_bytes)

    @staticmethod
    def _may_replace(node: Node, parent: Node) -> bool:
        return (
            parent.is_placed
            and not parent.is_output
            and parent.layout == node.layout
            and parent.n_readers == 1
            and parent.n_views == 0
        )

    def _release(self, parent: Node) -> None:
        if parent.n_readers or parent.n_views:
            return
        owner = parent
        if parent.view_of is not None:
            owner = parent.view_of
            owner.n_views -= 1
            if owner.n_views or owner.n_readers:
                return
        if owner.is_placed and not owner.is_output:
            self._free.give(owner.offset, owner.n_bytes)
            owner.is_placed = False
