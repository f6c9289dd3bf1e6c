from __future__ import annotations

from nanorun.plan.graph.graph_allocator import Graph, Node, buffer_bytes


def tensor(n_bytes: int, *inputs: Node, in_place: bool = False) -> Node:
    return Node(n_bytes, inputs, layout=(n_bytes,), in_place=in_place)


def bytes_of(*results: Node) -> int:
    results[-1].is_output = True
    graph = Graph()
    graph.expand(*results)
    return buffer_bytes(graph)


def test_input_and_result_live_together() -> None:
    assert bytes_of(tensor(64, tensor(128))) == 192


def test_sizes_are_rounded_up_to_the_alignment() -> None:
    assert bytes_of(tensor(33, tensor(1))) == 64 + 32


def test_place_is_used_again_after_the_last_reader() -> None:
    first = tensor(96)
    second = tensor(96, first)
    # The third fits where the first was.
    assert bytes_of(tensor(96, second)) == 192


def test_branch_keeps_its_place_until_it_is_read() -> None:
    first = tensor(96)
    second = tensor(96, first)
    third = tensor(96, second)
    assert bytes_of(tensor(96, third, first)) == 288


def test_elementwise_result_is_written_over_its_input() -> None:
    assert bytes_of(tensor(96, tensor(96), in_place=True)) == 96


def test_input_with_another_reader_is_not_written_over() -> None:
    first = tensor(96)
    assert bytes_of(tensor(96, tensor(96, first, in_place=True), first)) == 288


def test_input_of_another_shape_is_not_written_over() -> None:
    assert bytes_of(tensor(64, tensor(96), in_place=True)) == 160


def test_view_keeps_the_place_of_what_it_shows() -> None:
    first = tensor(96)
    second = tensor(96, first.view())
    assert bytes_of(tensor(96, second)) == 192
    first = tensor(96)
    shown = first.view()
    assert bytes_of(tensor(96, tensor(96, tensor(96, shown)), shown)) == 288


def test_weights_and_caches_take_no_place() -> None:
    weight = Node(10**9, is_external=True)
    assert bytes_of(tensor(64, weight, tensor(32))) == 96


def test_smallest_hole_that_fits_is_taken() -> None:
    large, small = tensor(256), tensor(64)
    keeper = tensor(32, large, small)  # after it both holes are free
    result = tensor(64, keeper)
    assert bytes_of(tensor(256, result)) == 256 + 64 + 32
