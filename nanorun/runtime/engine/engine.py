"""The engine: requests in, events out, one thread.

`submit` queues a request, `step` does one round of work (admit, evaluate one batch, pick tokens)
and returns what happened, `cancel` and the dial's verbs change a running reply. The caller owns
the loop; `worker.py` is that caller in the product, tests drive it by hand.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import chain, count

from nanorun.errors import ContextFull, NanorunError
from nanorun.model.chat import EngineStats, Event, Finished, FinishReason
from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.drafting.choose import check_speculation, choose_drafter
from nanorun.runtime.engine.admission import MIN_SHARED_TOKENS, Admission
from nanorun.runtime.engine.guessing import guess
from nanorun.runtime.engine.request import Request
from nanorun.runtime.engine.scheduler import last_in_turn, plan_rows, separate_guesses
from nanorun.runtime.engine.sequence import Sequence
from nanorun.runtime.engine.unsaved import Unsaved
from nanorun.runtime.engine.waiting import Waiting, may_overtake
from nanorun.runtime.llama.context import Aborted, CacheFull, Context
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.llama.penalties import build_penalties
from nanorun.runtime.llama.row import Row
from nanorun.runtime.prompt_state.archive import Archive
from nanorun.runtime.prompt_state.branch import Branch
from nanorun.runtime.prompt_state.prefix_tree import PrefixTree
from nanorun.runtime.prompt_state.store import open_store
from nanorun.runtime.reply.reply import Advance, Reply, ReplySettings
from nanorun.runtime.sampling.sampler import Sampler

# Cells a reply needs beyond its prompt before it is worth starting.
_MIN_REPLY_CELLS = 64
# Shorter conversations are read again sooner than they are loaded from disk.
_MIN_SAVED_TOKENS = 128

Output = tuple[str, Event | NanorunError]
"""A request's id and what happened to it; an error or `Finished` is its last."""
Plan = list[tuple[Sequence, Row]]
NewReply = Callable[[ReplySettings, LoadedModel, Sampler, int], Reply]


class Engine:
    """A loaded model that answers several requests at once.

    Args:
        model: The weights; closed with the engine.
        options: Sizes of the context.
        new_reply: Makes replies; tests listen in on them.

    Raises:
        MemoryPlanError: If the context cannot be allocated.
    """

    def __init__(
        self, model: LoadedModel, options: EngineOptions, new_reply: NewReply = Reply
    ) -> None:
        self.model = model
        self.options = options
        check_speculation(model, options)
        self.context = Context(model, options)
        self.memory, self.drafter = choose_drafter(self.context, options)
        self.tree = PrefixTree(
            self.memory,
            options.n_seq_max,
            self.context.n_ctx,
            Archive(options.archive_bytes, open_store(model, options), _MIN_SAVED_TOKENS),
            options.checkpoint_bytes,
        )
        self._new_reply = new_reply
        self._admission: Admission[Sequence] = Admission(self.tree)
        self._waiting: Waiting[Sequence] = Waiting()
        self._running: list[Sequence] = []
        self._in_batch: list[Sequence] = []
        self._unsaved = Unsaved(self.tree)
        self._orders = count()
        self._batch_lock = threading.Lock()
        self._n_batches = 0

    def close(self) -> None:
        """Save what is worth keeping, free the context and the weights."""
        for sequence in list(self._running):
            self._leave(sequence, keep=True)
        self._unsaved.save_all()
        self.tree.close()
        self.memory.close()
        self.model.close()

    @property
    def busy(self) -> bool:
        """Whether `step` has work."""
        return bool(self._waiting or self._running)

    # -- requests -------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request. One that answers ends all reading ahead; what that read so far stays.

        Raises:
            ContextFull: If its prompt cannot fit even an empty context.
        """
        n_prompt, n_ctx = len(request.prompt), self.context.n_ctx
        if n_prompt + 1 > n_ctx:
            n_trained = self.model.arch.n_ctx_train
            n_wanted = _round_up(n_prompt + 512)
            longer = f"nanorun run {self.model.path} --n-ctx {n_wanted}"
            raise ContextFull(
                f"the prompt has {n_prompt} tokens, but the context holds {n_ctx}",
                facts=[f"the model was trained for {n_trained}"],
                tries=[longer] if n_wanted <= n_trained else [],
            )
        reply = None
        if request.reply is not None:
            self._stop_reading_ahead()
            reply = self._reply_to(request.reply, n_ctx - n_prompt)
        self._waiting.add(Sequence(request, next(self._orders), reply))

    def _reply_to(self, settings: ReplySettings, n_most: int) -> Reply:
        penalties = build_penalties(settings.sampling, self.model.n_vocab, self.model.vocab)
        return self._new_reply(settings, self.model, Sampler(settings.sampling, penalties), n_most)

    def _stop_reading_ahead(self) -> None:
        for sequence in [s for s in (*self._waiting, *self._running) if s.is_read_only]:
            self._leave(sequence, keep=True)

    def cancel(self, request_id: str) -> None:
        """Ask a request to end; it does within one batch. May be called from any thread."""
        self._cancel(self._find(request_id))

    def cancel_all(self) -> None:
        """Ask all requests to end, as `cancel` does."""
        self._cancel([*self._waiting, *tuple(self._running)])

    def _cancel(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.cancelled = True
        with self._batch_lock:
            # A batch of several sequences moves the states of others (docs/engine-hazards.md).
            if len(self._in_batch) == 1 and self._in_batch[0].cancelled:
                self.context.abort()

    def finish_thinking(self, request_id: str) -> None:
        """End the thinking of a reply soon ("answer now")."""
        for sequence in self._find(request_id):
            if sequence.reply is not None:
                sequence.reply.finish_thinking()

    def set_budget(self, request_id: str, budget: int | None) -> None:
        """Give a reply another budget of thinking tokens."""
        for sequence in self._find(request_id):
            if sequence.reply is not None:
                sequence.reply.set_budget(budget)

    def _find(self, request_id: str) -> list[Sequence]:
        sequences = chain(self._waiting, tuple(self._running))
        return [sequence for sequence in sequences if sequence.request.id == request_id]

    def stats(self) -> EngineStats:
        """What is held right now."""
        return EngineStats(
            n_running=len(self._running),
            n_waiting=len(self._waiting),
            n_sequences=len(self.tree.branches),
            n_cells=self.context.n_ctx,
            n_cells_used=self.tree.n_cells_used,
            checkpoint_bytes=self.tree.checkpoint_bytes,
            archive_bytes=self.tree.archive_bytes,
            n_batches=self._n_batches,
        )

    def change_spare(self, n_bytes: int) -> None:
        """Hold less, or allow more, host memory for states that can be made again.

        Args:
            n_bytes: Below 0: that much less than is held now. Above: that much more than was
                allowed, within the options.
        """
        n_from = self.tree.spare_bytes if n_bytes < 0 else self.tree.spare_limit_bytes
        self.tree.limit_spare(n_from + n_bytes)

    def save_one(self) -> bool:
        """Begin to write a conversation that changed, unless one is being written, in idle time.

        Returns:
            False if none is left.
        """
        self._unsaved.save_one()
        return bool(self._unsaved)

    # -- one round ------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Do one round: drop cancelled requests, admit, evaluate one batch, pick tokens."""
        outputs = self._sweep_cancelled()
        outputs += self._admit()
        if self.options.n_rs_seq:
            guess(self.drafter, self._running, self.context.n_ctx, self.options.n_draft)
        plan, starved = self._fit(
            plan_rows(self._running, self.options.n_batch, self.options.n_ubatch)
        )
        for sequence in starved:
            if sequence.reply is not None:
                outputs += [(sequence.request.id, event) for event in sequence.reply.cut_off()]
            outputs += self._finish(sequence, "length")
        if plan:
            outputs += self._evaluate(plan)
        return outputs

    def _sweep_cancelled(self) -> list[Output]:
        gone = [s for s in (*self._waiting, *self._running) if s.cancelled]
        return [output for sequence in gone for output in self._finish(sequence, "cancelled")]

    def _admit(self) -> list[Output]:
        outputs: list[Output] = []
        if not self._waiting:
            return outputs
        blocked: Sequence | None = None
        for sequence in self._waiting.head():
            if blocked is not None and not may_overtake(sequence, blocked):
                continue
            if self._waits_for_leader(sequence):
                continue
            if not self._find_place(sequence):
                if self._is_full:
                    break
                blocked = blocked or sequence
                continue
            match = self._admission.match(sequence)
            branch = self.tree.acquire(match)
            if branch is None:
                break
            if blocked is not None:
                blocked.n_overtaken += 1
            is_new = not sequence.started
            self._start(sequence, branch, match.n_common)
            if is_new and not sequence.is_read_only:
                outputs.append((sequence.request.id, sequence.progress()))
        return outputs

    def _find_place(self, sequence: Sequence) -> bool:
        """Whether a sequence can run now; what is in the background gives way to others."""
        while not self._has_place(sequence):
            victim = last_in_turn(self._running, than=sequence)
            if victim is None:
                return False
            self._suspend(victim)
        return True

    @property
    def _is_full(self) -> bool:
        return len(self._running) >= self.options.n_parallel

    def _has_place(self, sequence: Sequence) -> bool:
        if not self._running:
            return True
        if self._is_full:
            return False
        n_needed = self.tree.n_cells_needed(self._admission.match(sequence)) + _MIN_REPLY_CELLS
        n_promised = sum(other.n_to_read for other in self._running)
        return n_needed + n_promised <= self.tree.n_cells_obtainable()

    def _suspend(self, sequence: Sequence) -> None:
        """Take a sequence's branch away; it goes on when there is room again."""
        self._running.remove(sequence)
        self.tree.release(sequence.suspend())
        self._waiting.add(sequence)

    def _waits_for_leader(self, sequence: Sequence) -> bool:
        """Whether a running prefill will soon hold more of this prompt than anything else does."""
        # Background work may itself be kept waiting for others.
        candidates = [s for s in self._running if s.turn[:2] <= sequence.turn[:2]]
        found = self._admission.leader(sequence, candidates)
        if found is None:
            return False
        leader, n_shared = found
        leader.pauses.add(n_shared)
        return True

    def _start(self, sequence: Sequence, branch: Branch, n_common: int) -> None:
        self._admission.forget(sequence)
        self._waiting.remove(sequence)
        self._running.append(sequence)
        sequence.start(branch)
        if sequence.n_prefix <= branch.n_tokens:
            self._keep_prefix(branch, sequence.n_prefix)
        if n_common - branch.n_tokens >= MIN_SHARED_TOKENS:
            sequence.pauses.add(n_common)  # where prompts part, the next one will part as well

    def _keep_prefix(self, branch: Branch, n_tokens: int) -> None:
        if n_tokens >= _MIN_SAVED_TOKENS:
            self.tree.keep_prefix(branch, n_tokens)

    def _fit(self, plan: Plan) -> tuple[Plan, list[Sequence]]:
        """Make room for a batch: who came last is suspended; who is alone has used it all up."""
        while plan and not self.tree.make_room(sum(len(row.tokens) for _, row in plan)):
            victim = last_in_turn(self._running)
            assert victim is not None
            if len(self._running) == 1:
                return [], [victim]
            self._suspend(victim)
            plan = [(sequence, row) for sequence, row in plan if sequence is not victim]
        return plan, []

    def _evaluate(self, plan: Plan) -> list[Output]:
        outputs: list[Output] = []
        for part in separate_guesses(plan, self.options.n_ubatch):
            # A part that fails ends the sequences of the others as well.
            if part := [(sequence, row) for sequence, row in part if sequence in self._running]:
                outputs += self._evaluate_part(part)
        return outputs

    def _evaluate_part(self, plan: Plan) -> list[Output]:
        batch = [sequence for sequence, _ in plan]
        self._n_batches += 1
        with self._batch_lock:
            self._in_batch = batch
        try:
            indices = self.memory.decode([row for _, row in plan])
            advances = [self._advance(s, r, i) for (s, r), i in zip(plan, indices, strict=True)]
            self.memory.keep(
                [(r, r.n_certain + a.n_accepted) for (_, r), a in zip(plan, advances, strict=True)]
            )
        except Aborted:
            return [output for sequence in batch for output in self._break_off(sequence)]
        except CacheFull as error:
            return [self._fail(sequence, error) for sequence in batch]
        except NanorunError as error:
            # The states of sequences beside the batch may have been on the move.
            outputs = [self._fail(sequence, error) for sequence in tuple(self._running)]
            self.tree.drop_idle()
            return outputs
        finally:
            with self._batch_lock:
                self._in_batch = []
                self.context.resume()
        return [o for s, a in zip(batch, advances, strict=True) for o in self._conclude(s, a)]

    # -- one sequence ---------------------------------------------------------------------------

    def _advance(self, sequence: Sequence, row: Row, index: int | None) -> Advance:
        """Book what was evaluated; with logits, let the reply go on as far as the guesses hold."""
        assert sequence.branch is not None
        events: list[Event] = []
        if sequence.in_prefill and sequence.reply is not None and not sequence.reply.n_tokens:
            events.append(sequence.progress(sequence.n_evaluated + row.n_certain))
        advance = Advance(0, None, events)
        if index is not None and sequence.reply is not None:
            logits = self.memory.logits_of(index, row.n_drafts + 1)
            advance = sequence.reply.advance(logits, row.tokens[row.n_certain :])
            advance.events[:0] = events
            sequence.note(advance, self.options.n_draft)
        n_kept = row.n_certain + advance.n_accepted
        self.tree.extend(sequence.branch, row.tokens[:n_kept], settled=n_kept == len(row.tokens))
        return advance

    def _conclude(self, sequence: Sequence, advance: Advance) -> list[Output]:
        """What a batch came to for one sequence, once its branch is in order."""
        outputs: list[Output] = [(sequence.request.id, event) for event in advance.events]
        if advance.failure is not None:
            return [*outputs, self._fail(sequence, advance.failure)]
        reply = sequence.reply
        if reply is not None and reply.end is not None:
            outputs += [(sequence.request.id, event) for event in reply.last_words()]
            return outputs + self._finish(sequence, reply.end)
        if sequence.n_evaluated in sequence.pauses:
            sequence.pauses.discard(sequence.n_evaluated)
            assert sequence.branch is not None
            self.tree.checkpoint(sequence.branch)
            if sequence.n_evaluated == sequence.n_prefix:
                self._keep_prefix(sequence.branch, sequence.n_prefix)
        if sequence.is_read_only and not sequence.in_prefill:
            self._leave(sequence, keep=True)
        return outputs

    def _finish(
        self, sequence: Sequence, reason: FinishReason, *, keep: bool = True
    ) -> list[Output]:
        self._leave(sequence, keep=keep)
        if sequence.reply is None:
            return []
        event = Finished(reason, sequence.usage(), sequence.timings(), sequence.reply.stopped_by)
        return [(sequence.request.id, event)]

    def _break_off(self, sequence: Sequence) -> list[Output]:
        """End a sequence in mid-batch; what it had read up to its last checkpoint stays."""
        assert sequence.branch is not None
        keep = self.tree.cut_to_checkpoint(sequence.branch)
        return self._finish(sequence, "cancelled", keep=keep)

    def _fail(self, sequence: Sequence, error: NanorunError) -> Output:
        self._leave(sequence, keep=False)
        return sequence.request.id, error

    def _leave(self, sequence: Sequence, *, keep: bool) -> None:
        """Take a sequence out of the engine; its branch stays for later prompts if it is sound."""
        self._admission.forget(sequence)
        (self._waiting if sequence in self._waiting else self._running).remove(sequence)
        if sequence.reply is not None:
            sequence.reply.close()
        if sequence.branch is not None:
            if keep:
                self._unsaved.note(sequence.request.id, sequence.branch)
            self.tree.release(sequence.branch, keep=keep)


def _round_up(n: int, multiple: int = 1024) -> int:
    return -(-n // multiple) * multiple
