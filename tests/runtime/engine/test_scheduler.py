from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nanorun.runtime.engine.scheduler import (
    MAX_PREFILL_BESIDE_DECODE,
    MAX_READ_AHEAD,
    N_SHARES,
    last_in_turn,
    plan_rows,
    separate_guesses,
)
from nanorun.runtime.prompt_state.prefixes import Tokens


@dataclass
class FakeSequence:
    n_prompt: int
    n_evaluated: int
    seq_id: int = 0
    pending: int | None = None
    drafts: list[int] = field(default_factory=list)
    pauses: set[int] = field(default_factory=set)

    background: bool = False
    order: int = 0

    is_read_only: bool = False

    @property
    def prompt(self) -> Tokens:
        return np.arange(self.n_prompt, dtype=np.int32)

    @property
    def turn(self) -> tuple[bool, bool, int]:
        return (False, self.background, self.order)

    @property
    def branch(self) -> Any:
        return SimpleNamespace(seq_id=self.seq_id)

    @property
    def in_prefill(self) -> bool:
        return self.n_evaluated < self.n_prompt


def answering(seq_id: int) -> FakeSequence:
    return FakeSequence(n_prompt=5, n_evaluated=9, seq_id=seq_id, pending=7)


def test_prompt_is_read_one_ubatch_at_a_time() -> None:
    ((_, row),) = plan_rows([FakeSequence(1000, 100)], n_batch=512, n_ubatch=256)
    assert (row.pos, len(row.tokens), row.wants_logits) == (100, 256, False)


def test_last_piece_of_a_prompt_wants_logits() -> None:
    ((_, row),) = plan_rows([FakeSequence(130, 100)], n_batch=512, n_ubatch=256)
    assert (len(row.tokens), row.wants_logits) == (30, True)


def test_answering_sequences_come_first_and_keep_prompts_short() -> None:
    sequences = [FakeSequence(1000, 0, seq_id=1), answering(2), answering(3)]
    plan = plan_rows(sequences, n_batch=512, n_ubatch=512)
    assert [row.seq_id for _, row in plan] == [2, 3, 1]
    assert [len(row.tokens) for _, row in plan] == [1, 1, MAX_PREFILL_BESIDE_DECODE]


def test_prompts_share_a_batch_in_order_of_arrival() -> None:
    plan = plan_rows([FakeSequence(100, 0, 1), FakeSequence(500, 0, 2)], n_batch=256, n_ubatch=256)
    assert [(row.seq_id, len(row.tokens)) for _, row in plan] == [(1, 100), (2, 156)]


def test_short_prompt_is_read_whole_beside_a_long_one() -> None:
    plan = plan_rows([FakeSequence(25_000, 512, 1), FakeSequence(30, 0, 2, order=1)], 512, 512)
    rows = [(row.seq_id, len(row.tokens), row.wants_logits) for _, row in plan]
    assert rows == [(2, 30, True), (1, 482, False)]


def test_prompts_of_about_one_length_are_read_in_order_of_arrival() -> None:
    sequences = [FakeSequence(15_000, 0, 1), FakeSequence(9_000, 0, 2, order=1)]
    plan = plan_rows(sequences, n_batch=512, n_ubatch=512)
    assert [(row.seq_id, len(row.tokens)) for _, row in plan] == [(1, 512)]


def test_the_prompt_that_came_first_keeps_its_share() -> None:
    sequences = [FakeSequence(25_000, 0, 1), FakeSequence(900, 0, 2, order=1)]
    plan = plan_rows(sequences, n_batch=512, n_ubatch=512)
    assert [(row.seq_id, len(row.tokens)) for _, row in plan] == [(2, 384), (1, 128)]
    sequences[0].pauses = {40}  # it has no use for all of its share
    plan = plan_rows(sequences, n_batch=512, n_ubatch=512)
    assert [(row.seq_id, len(row.tokens)) for _, row in plan] == [(2, 472), (1, 40)]


@pytest.mark.parametrize("n_answering", [0, 1])
def test_long_prompt_is_read_in_a_known_number_of_batches_however_many_short_ones_come(
    n_answering: int,
) -> None:
    long = FakeSequence(25_000, 0, 1)
    room = MAX_PREFILL_BESIDE_DECODE if n_answering else 512
    n_batches = 0
    while long.in_prefill:
        # As many new prompts come each time as would fill the batch alone.
        short = [FakeSequence(200, 0, i, order=i) for i in range(2, 6)]
        plan = plan_rows([long, *short, *[answering(9)] * n_answering], 512, 512)
        for sequence, row in plan:
            if not row.wants_logits or sequence.in_prefill:
                sequence.n_evaluated += len(row.tokens)
        n_batches += 1
    assert n_batches <= math.ceil(25_000 / (room / N_SHARES))


def test_prompts_that_somebody_waits_for_are_read_first() -> None:
    sequences = [FakeSequence(400, 0, 1, background=True), FakeSequence(100, 0, 2, order=1)]
    plan = plan_rows(sequences, n_batch=256, n_ubatch=256)
    assert [(row.seq_id, len(row.tokens)) for _, row in plan] == [(2, 100), (1, 156)]


def test_guesses_are_checked_with_those_of_their_length_alone() -> None:
    sequences = [answering(i) for i in range(5)]
    for sequence, n in zip(sequences, (2, 0, 1, 2, 2), strict=True):
        sequence.drafts = [9] * n
    plan = plan_rows([*sequences, FakeSequence(100, 0, seq_id=5)], n_batch=64, n_ubatch=64)
    parts = separate_guesses(plan, n_ubatch=64)
    assert [[row.seq_id for _, row in part] for part in parts] == [[1, 5], [2], [0, 3, 4]]
    in_ubatches = separate_guesses(plan, n_ubatch=8)
    assert [[row.seq_id for _, row in part] for part in in_ubatches] == [[1, 5], [2], [0, 3], [4]]


def test_a_batch_without_guesses_is_not_cut() -> None:
    plan = plan_rows([answering(0), answering(1), FakeSequence(100, 0, 2)], n_batch=64, n_ubatch=64)
    assert separate_guesses(plan, n_ubatch=8) == [plan]


def test_the_newest_background_sequence_gives_way_first() -> None:
    sequences = [
        FakeSequence(1, 0, order=0, background=True),
        FakeSequence(1, 0, order=1, background=True),
        FakeSequence(1, 0, order=2),
    ]
    assert last_in_turn(sequences) is sequences[1]
    assert last_in_turn(sequences[2:]) is sequences[2]


def test_only_background_work_gives_way_to_an_interactive_sequence() -> None:
    interactive, background = FakeSequence(1, 0, order=0), FakeSequence(1, 0, background=True)
    newcomer = FakeSequence(1, 0, order=5)
    assert last_in_turn([interactive, background], than=newcomer) is background
    assert last_in_turn([interactive], than=newcomer) is None
    assert last_in_turn([interactive, background], than=FakeSequence(1, 0, background=True)) is None


def test_prefill_pauses_at_a_stop() -> None:
    ((_, row),) = plan_rows([FakeSequence(1000, 100, pauses={50, 100, 140})], 512, 512)
    assert len(row.tokens) == 40


def test_what_nobody_waits_for_is_read_in_small_pieces() -> None:
    ahead = FakeSequence(1000, 0, is_read_only=True)
    ((_, row),) = plan_rows([ahead], n_batch=512, n_ubatch=512)
    assert len(row.tokens) == MAX_READ_AHEAD
    plan = plan_rows([ahead, FakeSequence(400, 0, 1)], n_batch=512, n_ubatch=512)
    assert sum(len(row.tokens) for _, row in plan) == 512
