"""From logits to the next tokens of a reply: who decides, what is said of it, where it ends."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from nanorun.chat.markup import THINK
from nanorun.errors import NanorunError, UsageError
from nanorun.model.chat import Event, FinishReason, TokenLogprobs
from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.engine.stream import Stream
from nanorun.runtime.llama.context import Context, Row
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.reply.dial import Phase
from nanorun.runtime.sampling.draw import Ids
from nanorun.runtime.sampling.sampler import Choice

# A model that insists on its end has its way.
_MOST_ENDS_REFUSED = 8


@dataclass(slots=True)
class Pick:
    """What one batch brought to a stream."""

    n_kept: int
    """Tokens of its row that stay; guesses that did not hold are taken back."""
    events: list[Event] = field(default_factory=list)
    reason: FinishReason | None = None
    """Why the reply ends here, if it does."""
    failure: NanorunError | None = None


class TokenPicker:
    """Chooses tokens for the streams of an engine.

    Args:
        model: Knows which tokens end a reply, and their bytes.
        context: Holds the logits.
        options: `n_draft` is used here.
    """

    def __init__(self, model: LoadedModel, context: Context, options: EngineOptions) -> None:
        self._model = model
        self._context = context
        self._n_draft = options.n_draft

    def pick(self, stream: Stream, row: Row, index: int, pick: Pick) -> None:
        """Pick the token after the evaluated ones, and on while it is the one that was guessed."""
        drafts = row.tokens[len(row.tokens) - row.n_drafts :]
        for i in range(row.n_drafts + 1):
            self._pick_one(stream, index + i, pick)
            if pick.failure or pick.reason or i == len(drafts) or stream.pending != drafts[i]:
                break
            pick.n_kept += 1
        if drafts:
            n_accepted = pick.n_kept - (len(row.tokens) - row.n_drafts)
            stream.note_drafts(len(drafts), n_accepted, self._n_draft)

    def _pick_one(self, stream: Stream, index: int, pick: Pick) -> None:
        """Choose the next token: a forced one, or a sampled one."""
        assert stream.sampler is not None
        request = stream.request
        if not stream.first_token:
            stream.first_token = time.monotonic()
        token = request.dial.forced()
        if token is not None:
            stream.sampler.accept(token)
        else:
            token = self._sample(stream, index, pick)
        if token is not None:
            self._take(stream, token, pick)

    def _sample(self, stream: Stream, index: int, pick: Pick) -> int | None:
        """The model's own choice; None if the reply ends here.

        A reply that ends while it still thinks goes on with the closing of the thinking instead.
        """
        assert stream.sampler is not None
        request = stream.request
        try:
            allowed = request.constraint.allowed() if request.constraint else None
        except UsageError as error:
            pick.failure = error
            return None
        choice = stream.sampler.sample(self._context.logits(index), allowed)
        if choice.token in self._model.end_tokens and self._owes_an_answer(stream):
            stream.n_ends_refused += 1
            no_ends = self._all_but(self._model.end_tokens)
            choice = stream.sampler.sample(self._context.logits(index), no_ends)
        if self._reopens_thinking(stream, choice.token):
            choice = stream.sampler.sample(
                self._context.logits(index), self._all_but({choice.token})
            )
        if choice.token not in self._model.end_tokens or request.ignore_eos:
            pick.events += self._logprobs(stream, choice)
            return choice.token
        if not request.dial.rescue():
            pick.reason = "stop"
            return None
        token = request.dial.forced()
        assert token is not None
        stream.sampler.accept(token)
        return token

    def _owes_an_answer(self, stream: Stream) -> bool:
        """Whether a reply has thought and then said nothing; nobody wants that for an answer."""
        request = stream.request
        return (
            request.thinks
            and request.constraint is None
            and not request.ignore_eos
            and request.dial.phase is Phase.ANSWER
            and not request.parser.has_answered
            and stream.n_ends_refused < _MOST_ENDS_REFUSED
        )

    def _reopens_thinking(self, stream: Stream, token: int) -> bool:
        """Whether a reply would think again although its thinking was ended for it."""
        request = stream.request
        return (
            request.dial.was_closed
            and request.constraint is None
            and token in self._model.control_tokens
            and self._model.piece(token) == THINK.encode()
        )

    def _all_but(self, tokens: Iterable[int]) -> Ids:
        return np.setdiff1d(np.arange(self._model.n_vocab), list(tokens))

    def _logprobs(self, stream: Stream, choice: Choice) -> list[Event]:
        """What was asked for of the token's likelihood."""
        if choice.logprob is None:
            return []
        event = TokenLogprobs(
            self._model.piece(choice.token),
            choice.logprob,
            tuple((self._model.piece(token), p) for token, p in choice.alternatives),
            stream.request.parser.in_thinking,
        )
        return [event]

    def _take(self, stream: Stream, token: int, pick: Pick) -> None:
        """Append a token to the reply."""
        request = stream.request
        piece = self._model.piece(token)
        events = request.parser.feed(piece, control=token in self._model.control_tokens)
        request.dial.observe(piece, in_thinking=request.parser.in_thinking)
        if request.constraint is not None:
            request.constraint.take(token)
            if not request.parser.in_thinking and request.dial.phase is Phase.ANSWER:
                request.constraint.answer_begins()
        stream.pending = token
        stream.n_completion += 1
        pick.events += events
        is_complete = request.constraint is not None and request.constraint.is_over
        full = len(request.prompt) + stream.n_completion >= self._context.n_ctx
        if request.parser.stopped_by is not None or is_complete:
            pick.reason = "stop"
        elif full or (request.max_tokens and stream.n_completion >= request.max_tokens):
            pick.reason = "length"
