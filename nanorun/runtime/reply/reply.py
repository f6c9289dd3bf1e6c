"""One reply in the making: logits in, tokens and events out; no engine.

Everything that decides about the next token meets here: the sampler, the reasoning dial, the form
that the answer is held to, and the parser that knows what the text means. They are told where the
reply is; `phase` is the only place that says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanorun.chat.markup import THINK
from nanorun.chat.parser import ReplyParser
from nanorun.chat.plain_text import PlainParser
from nanorun.errors import NanorunError, UsageError
from nanorun.model.chat import Event, FinishReason
from nanorun.runtime.reply.constraint import Constraint, Form
from nanorun.runtime.reply.dial import ReasoningDial
from nanorun.runtime.reply.likelihoods import Likelihoods
from nanorun.runtime.reply.phase import Phase
from nanorun.runtime.reply.vocabulary import Vocabulary
from nanorun.runtime.sampling.draw import Ids, Logits
from nanorun.runtime.sampling.sampler import Choice, Sampler
from nanorun.runtime.sampling.settings import SamplingSettings

# A model that insists on its end has its way.
_MOST_ENDS_REFUSED = 8
_IN_THINKING = (Phase.THINKING, Phase.LANDING)


@dataclass(frozen=True, slots=True)
class ReplySettings:
    """How a request is to be answered; several replies can be made by the same settings."""

    sampling: SamplingSettings
    thinks: bool = False
    """Whether the prompt ends with an open `<think>`."""
    budget: int | None = None
    """Thinking tokens allowed; None for no limit."""
    max_tokens: int | None = None
    """Most tokens of the reply, thinking included; None for what the context holds."""
    ignore_eos: bool = False
    tools: tuple[dict[str, Any], ...] = ()
    """Tools on offer, in OpenAI's form."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer."""
    form: Form | None = None
    plain: bool = False
    """Whether nothing is read from the text: it answers a raw prompt."""
    begun: str | None = None
    """The thinking or answer that the prompt ends with and the reply goes on; None if it begins."""


def _parser_for(settings: ReplySettings) -> ReplyParser | PlainParser:
    if settings.plain:
        return PlainParser(starts_in_thinking=settings.thinks, stop=settings.stop)
    return ReplyParser(
        starts_in_thinking=settings.thinks,
        tools=settings.tools,
        stop=settings.stop,
        continues=settings.begun is not None,
    )


@dataclass(frozen=True, slots=True)
class Advance:
    """What some rows of logits brought to a reply."""

    n_accepted: int
    """Guesses that held."""
    token: int | None
    """What was said last, to be evaluated next; None if nothing was."""
    events: list[Event] = field(default_factory=list)
    failure: NanorunError | None = None
    """Why the reply cannot go on, if it cannot."""


class Reply:
    """What is being said.

    Args:
        settings: How to answer.
        vocabulary: The model's tokens.
        sampler: Draws from logits; closed with the reply.
        n_most: Tokens that there is room for.
    """

    def __init__(
        self, settings: ReplySettings, vocabulary: Vocabulary, sampler: Sampler, n_most: int
    ) -> None:
        self.phase = Phase.THINKING if settings.thinks else Phase.ANSWERING
        self.end: FinishReason | None = None
        """Why the reply ended, once it did."""
        self.n_tokens = 0
        """Tokens said, thinking included."""
        self.n_most = min(settings.max_tokens or n_most, n_most)
        """Tokens after which it is cut off."""
        self._settings = settings
        self._vocabulary = vocabulary
        self._sampler = sampler
        self._parser = _parser_for(settings)
        self._likelihoods: Likelihoods | None = None
        if settings.sampling.logprobs is not None:
            self._likelihoods = Likelihoods(self._parser.origins, vocabulary.piece)
        begun = (settings.begun or "").encode("utf-8", "replace")
        self._dial = ReasoningDial(settings.budget, max_reply=self.n_most, begun=begun)
        self._constraint = Constraint(settings.form) if settings.form else None
        self._choice: Choice | None = None
        """What was picked last, unless it was forced."""
        self._forced: deque[int] = deque()
        """Tokens that come next whatever the model wants."""
        self._was_closed = False
        """Whether its thinking did not end by itself."""
        self._n_ends_refused = 0
        if settings.thinks:
            self._heed_dial()
        elif self._constraint is not None:
            self._constraint.answer_begins()

    @property
    def n_thinking(self) -> int:
        """Thinking tokens said."""
        return self._dial.n_thinking

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self._parser.stopped_by

    def close(self) -> None:
        """Free what the sampler holds."""
        self._sampler.close()

    # -- the dial's verbs -------------------------------------------------------------------------

    def finish_thinking(self) -> None:
        """End the thinking at the next line or sentence ("answer now")."""
        self.set_budget(0)

    def set_budget(self, budget: int | None) -> None:
        """Change the budget of thinking tokens; no effect once the reply answers."""
        self._dial.set_budget(budget)
        if self.phase in _IN_THINKING:
            self._heed_dial()

    # -- tokens -----------------------------------------------------------------------------------

    def advance(self, logits: NDArray[np.float32], drafts: Sequence[int] = ()) -> Advance:
        """Say the next token, and on while it is the one that was guessed.

        Args:
            logits: After the last token and after each guess, shape `(1 + len(drafts), n_vocab)`.
            drafts: Guesses at what follows the last token.
        """
        events: list[Event] = []
        token, n_accepted = None, 0
        for i, row in enumerate(logits):
            try:
                picked = self.pick(row)
            except UsageError as error:
                return Advance(n_accepted, token, events, failure=error)
            if picked is None:
                break
            token = picked
            events += self.take(token)
            if self.end is not None or i == len(drafts) or token != drafts[i]:
                break
            n_accepted += 1
        return Advance(n_accepted, token, events)

    def pick(self, logits: Logits) -> int | None:
        """Choose the next token: a forced one, or a sampled one.

        Args:
            logits: One a token, shape `(n_vocab,)`.

        Returns:
            The token, or None if the reply ends here. One that ends while it still thinks goes on
            with the closing of the thinking instead: its reader would get no answer at all.

        Raises:
            UsageError: If the form allows nothing.
        """
        if self._forced:
            return self._force()
        choice = self._sample(logits)
        if choice.token not in self._vocabulary.end_tokens or self._settings.ignore_eos:
            self._choice = choice
            return choice.token
        if self.phase in _IN_THINKING:
            self._close_thinking()
            return self._force()
        self._finish("stop")
        return None

    def take(self, token: int) -> list[Event]:
        """Append a token to the reply; what has become certain of its text."""
        piece = self._vocabulary.piece(token)
        n_before = self._parser.origins.n_read
        events = self._parser.feed(piece, control=token in self._vocabulary.control_tokens)
        if self._likelihoods is not None:
            if self._choice is not None:
                self._likelihoods.add(self._choice, n_before)
            events = [*self._likelihoods.listed(self._parser.n_settled), *events]
        self.n_tokens += 1
        self._move(piece)
        is_complete = self._constraint is not None and self._follow(self._constraint, token)
        if self._parser.stopped_by is not None or is_complete:
            self._finish("stop")
        elif self.n_tokens >= self.n_most:
            self._finish("length")
        return events

    def cut_off(self) -> list[Event]:
        """End the reply for want of room."""
        self._finish("length")
        return self.last_words()

    def last_words(self) -> list[Event]:
        """What the parser held back, of a reply that has ended."""
        events = self._parser.finish()
        if self._likelihoods is not None:
            events = [*self._likelihoods.listed(None), *events]
        if self.end == "stop" and self._parser.n_tool_calls:
            self.end = "tool_calls"
        return events

    # -- guessing ahead ---------------------------------------------------------------------------

    def expected(self) -> list[int]:
        """Tokens that will come next, as far as dial and form leave no choice."""
        if self._forced:
            return list(self._forced)
        return self._constraint.expected() if self._constraint is not None else []

    def admitted(self, drafts: Sequence[int]) -> list[int]:
        """The beginning of a guess that the form allows."""
        return list(drafts) if self._constraint is None else self._constraint.admitted(drafts)

    # -- where the reply is -----------------------------------------------------------------------

    def _move(self, piece: bytes) -> None:
        """Go to the phase that a token led to."""
        if self._forced:
            self._forced.popleft()
            if not self._forced:
                self.phase = Phase.ANSWERING
        elif self._parser.in_thinking:
            # It may have answered before: what looked like a call was none, or it thinks again.
            self._dial.take(piece)
            self._heed_dial()
        else:
            self.phase = Phase.CALLING if self._parser.in_call else Phase.ANSWERING

    def _heed_dial(self) -> None:
        self.phase = self._dial.asks_for
        if self.phase is Phase.CLOSING:
            self._close_thinking()

    def _close_thinking(self) -> None:
        """End the thinking by force."""
        vocabulary = self._vocabulary
        self._forced.extend(
            vocabulary.closing_after_newline
            if self._dial.ends_line
            else vocabulary.closing_after_text
        )
        self.phase = Phase.CLOSING
        self._was_closed = True

    def _follow(self, constraint: Constraint, token: int) -> bool:
        """Go on in the form; whether it is complete."""
        constraint.take(token)
        if self.phase in (Phase.ANSWERING, Phase.CALLING):
            constraint.answer_begins()
        return constraint.is_over

    def _finish(self, reason: FinishReason) -> None:
        self.end = reason
        self.phase = Phase.ENDED

    # -- the model's own choice -------------------------------------------------------------------

    def _force(self) -> int:
        token = self._forced[0]
        self._choice = None
        self._sampler.accept(token)
        return token

    def _sample(self, logits: Logits) -> Choice:
        """A token that may stand here."""
        allowed = self._constraint.allowed() if self._constraint is not None else None
        choice = self._sampler.sample(logits, allowed)
        refused: frozenset[int] = frozenset()
        while more := self._refused(choice.token):
            refused |= more
            choice = self._sampler.sample(logits, self._all_but(refused))
        return choice

    def _refused(self, token: int) -> frozenset[int]:
        """Tokens that may not stand here, seeing that the model wants this one."""
        if token in self._vocabulary.end_tokens and self._owes_an_answer:
            self._n_ends_refused += 1
            return self._vocabulary.end_tokens
        return frozenset({token}) if self._reopens_thinking(token) else frozenset()

    @property
    def _owes_an_answer(self) -> bool:
        """Whether it has thought and then said nothing; nobody wants that for an answer."""
        return (
            self._settings.thinks
            and self._constraint is None
            and not self._settings.ignore_eos
            and self.phase is Phase.ANSWERING
            and not self._parser.has_answered
            and self._n_ends_refused < _MOST_ENDS_REFUSED
        )

    def _reopens_thinking(self, token: int) -> bool:
        """Whether it would think again although its thinking was ended for it."""
        return (
            self._was_closed
            and self._constraint is None
            and token in self._vocabulary.control_tokens
            and self._vocabulary.piece(token) == THINK.encode()
        )

    def _all_but(self, tokens: Iterable[int]) -> Ids:
        return np.setdiff1d(np.arange(self._vocabulary.n_vocab), list(tokens))
