"""Guesses at what replies will say next, before a batch is laid out."""

from __future__ import annotations

from collections.abc import Iterable

from nanorun.runtime.drafting.drafter import Drafter, DraftRequest
from nanorun.runtime.engine.sequence import Sequence
from nanorun.runtime.reply.reply import Reply


def guess(drafter: Drafter, sequences: Iterable[Sequence], n_ctx: int, n_most: int) -> None:
    """Give answering sequences what they must say next, else what the drafter thinks.

    Args:
        drafter: Who guesses.
        sequences: Those that run.
        n_ctx: Cells of the context.
        n_most: Tokens to guess at most, for each.
    """
    requests = []
    for sequence in sequences:
        if sequence.reply is None or sequence.pending is None or sequence.in_prefill:
            continue
        request = _request(sequence, sequence.reply, sequence.pending, n_ctx, n_most)
        sequence.drafts = sequence.reply.expected()[: request.n_most]
        if not sequence.drafts:
            requests.append((sequence, sequence.reply, request))
    drafts = drafter.draft([request for _, _, request in requests])
    for (sequence, reply, _), tokens in zip(requests, drafts, strict=True):
        sequence.drafts = reply.admitted(tokens)


def _request(
    sequence: Sequence, reply: Reply, pending: int, n_ctx: int, n_most: int
) -> DraftRequest:
    assert sequence.branch is not None
    n_left = min(n_ctx - sequence.n_evaluated - 2, reply.n_most - reply.n_tokens - 1)
    n_tokens = max(0, min(n_left, sequence.n_draft, n_most))
    return DraftRequest(sequence.branch.seq_id, sequence.branch.tokens, pending, n_tokens)
