"""Which tokens go into the next batch: pure decisions, no engine.

Sequences that are answering come first, one token each, so that a long prompt never stops them;
prompts share what is left of the batch, those with the least left to read first, and in order of
arrival among prompts of about one length. The one that came first always gets its share, so that
however many short ones come, a long one is read in `N_SHARES` times the batches it takes alone.
While someone is answering, prompts are read in smaller pieces, because a batch delays every
sequence in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Protocol, TypeVar

from nanorun.runtime.llama.row import Row
from nanorun.runtime.prompt_state.branch import Branch
from nanorun.runtime.prompt_state.prefixes import Tokens

# Prompt tokens a batch may hold beside answering sequences.
MAX_PREFILL_BESIDE_DECODE = 128
# Tokens of a batch that only reads ahead: a request that comes meanwhile waits for its end.
MAX_READ_AHEAD = 32
# Of the room for prompts in a batch, the one that came first gets at least one part in so many.
N_SHARES = 4


class Schedulable(Protocol):
    """What the scheduler needs to know of a sequence."""

    prompt: Tokens
    branch: Branch | None
    pending: int | None
    drafts: list[int]
    pauses: set[int]

    @property
    def is_read_only(self) -> bool:
        """Whether nothing is said after the prompt."""

    @property
    def n_evaluated(self) -> int:
        """Tokens read so far."""

    @property
    def in_prefill(self) -> bool:
        """Whether prompt tokens are left."""

    @property
    def turn(self) -> tuple[bool, bool, int]:
        """Sorts sequences: who is served first."""


S = TypeVar("S", bound=Schedulable)


def plan_rows(sequences: Sequence[S], n_batch: int, n_ubatch: int) -> list[tuple[S, Row]]:
    """Lay out the next batch: answering sequences, then prompts within one ubatch.

    Args:
        sequences: Those that run; their turns decide whose prompt is read first.
        n_batch: Tokens a batch may hold.
        n_ubatch: Tokens after which a cancellation takes effect.
    """
    plan: list[tuple[S, Row]] = []
    in_turn = sorted(sequences, key=attrgetter("turn"))
    to_read = []
    for sequence in in_turn:
        branch = sequence.branch
        if branch is None:
            continue
        if sequence.in_prefill:
            to_read.append(sequence)
        elif sequence.pending is not None:
            drafts = sequence.drafts
            tokens = [sequence.pending, *drafts]
            row = Row(branch.seq_id, sequence.n_evaluated, tokens, True, n_drafts=len(drafts))
            plan.append((sequence, row))
    if not to_read:
        return plan
    n_left = min(n_batch, n_ubatch) - sum(len(row.tokens) for _, row in plan)
    if plan:
        n_left = min(n_left, MAX_PREFILL_BESIDE_DECODE)
    elif all(sequence.is_read_only for sequence in in_turn):
        n_left = min(n_left, MAX_READ_AHEAD)
    return plan + _prefill_rows(to_read, n_left)


def _prefill_rows(reading: Sequence[S], n_left: int) -> list[tuple[S, Row]]:
    """Share the room of a batch among prompts, given in the order of their turns."""
    if n_left <= 0:
        return []
    first = reading[0]
    n_kept = len(_prefill_row(first, -(-n_left // N_SHARES)).tokens)
    plan = []
    for sequence in sorted(reading, key=_reading_turn):
        if sequence is first:
            n_kept = 0
        if n_left > n_kept:
            row = _prefill_row(sequence, n_left - n_kept)
            plan.append((sequence, row))
            n_left -= len(row.tokens)
    return plan


def _reading_turn(sequence: Schedulable) -> tuple[bool, bool, int, int]:
    """Sorts prompts: whose is read first."""
    is_read_only, is_background, order = sequence.turn
    n_to_read = len(sequence.prompt) - sequence.n_evaluated
    power_of_4 = n_to_read.bit_length() // 2  # prompts between two of them are about as long
    return is_read_only, is_background, power_of_4, order


def _prefill_row(sequence: Schedulable, n_most: int) -> Row:
    """The next piece of a prompt, ending early where the sequence has to pause."""
    assert sequence.branch is not None
    prompt, start = sequence.prompt, sequence.n_evaluated
    end = min(len(prompt), start + n_most, *(p for p in sequence.pauses if p > start))
    wants_logits = end == len(prompt) and not sequence.is_read_only
    return Row(sequence.branch.seq_id, start, prompt[start:end].tolist(), wants_logits)


def separate_guesses(plan: Sequence[tuple[S, Row]], n_ubatch: int) -> list[list[tuple[S, Row]]]:
    """Cut a batch into parts that are evaluated one after the other; most often there is one.

    What a wrong guess is rolled back to lies beside the cell of its sequence, and stays there when
    another ubatch moves that cell (docs/engine-hazards.md). So rows with guesses are alone with
    rows of the same length, which llama.cpp puts into the same ubatch, and rolled back before the
    next part.
    """
    if not any(row.n_drafts for _, row in plan):
        return [list(plan)]
    by_length: dict[int, list[tuple[S, Row]]] = {}
    for sequence, row in plan:
        by_length.setdefault(len(row.tokens) if row.n_drafts else 0, []).append((sequence, row))
    parts = []
    for length, rows in sorted(by_length.items()):
        n_rows = n_ubatch // length if length else len(rows)
        parts += [rows[i : i + n_rows] for i in range(0, len(rows), n_rows)]
    return parts


def last_in_turn(running: Sequence[S], than: S | None = None) -> S | None:
    """The running sequence to suspend when there is not room for all.

    Args:
        running: Candidates.
        than: Who needs the room; only background work gives way to an interactive request.
    """
    candidates = [
        s for s in running if than is None or (s.turn[:2] > than.turn[:2] and s is not than)
    ]
    return max(candidates, key=lambda sequence: sequence.turn, default=None)
