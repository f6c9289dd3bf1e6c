"""The engine: requests in, events out, one thread.

`submit` queues a request, `step` does one round of work (admit, evaluate one batch, pick tokens)
and returns what happened, `cancel` and the dial's verbs change a running reply. The caller owns
the loop; `worker.py` is that caller in the product, tests drive it by hand.
"""

from __future__ import annotations

import threading
from itertools import chain, count

from nanorun.errors import ContextFull, NanorunError
from nanorun.model.chat import EngineStats, Event, Finished, FinishReason
from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.drafting.choose import build_drafter, check_speculation
from nanorun.runtime.drafting.drafter import Guess
from nanorun.runtime.engine.admission import Admission
from nanorun.runtime.engine.picking import Pick, TokenPicker
from nanorun.runtime.engine.request import Request
from nanorun.runtime.engine.scheduler import (
    last_in_turn,
    plan_rows,
    separate_guesses,
)
from nanorun.runtime.engine.stream import Stream
from nanorun.runtime.llama.context import Aborted, CacheFull, Context, Row
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.llama.penalties import build_penalties
from nanorun.runtime.prompt_state.archive import Archive
from nanorun.runtime.prompt_state.branch import Branch
from nanorun.runtime.prompt_state.prefix_tree import PrefixTree
from nanorun.runtime.prompt_state.store import open_store
from nanorun.runtime.sampling.sampler import Sampler

# Cells a reply needs beyond its prompt before it is worth starting.
_MIN_REPLY_CELLS = 64
# Shorter conversations are read again sooner than they are loaded from disk.
_MIN_SAVED_TOKENS = 128

Output = tuple[str, Event | NanorunError]
"""A request's id and what happened to it; an error or `Finished` is its last."""
Plan = list[tuple[Stream, Row]]


class Engine:
    """A loaded model that answers several requests at once.

    Args:
        model: The weights; closed with the engine.
        options: Sizes of the context.

    Raises:
        MemoryPlanError: If the context cannot be allocated.
    """

    def __init__(self, model: LoadedModel, options: EngineOptions) -> None:
        self.model = model
        self.options = options
        check_speculation(model, options)
        self.context = Context(model, options)
        self.drafter = build_drafter(self.context, options)
        self.picker = TokenPicker(model, self.context, options)
        self.tree = PrefixTree(
            self.drafter.memory,
            options.n_seq_max,
            self.context.n_ctx,
            Archive(options.archive_bytes, open_store(model, options), _MIN_SAVED_TOKENS),
            options.checkpoint_bytes,
        )
        self._admission: Admission[Stream] = Admission(self.tree)
        self._waiting: list[Stream] = []
        self._running: list[Stream] = []
        self._in_batch: list[Stream] = []
        self._unsaved: dict[str, Branch] = {}
        """Sequences to be saved in idle time, by the request that made them. Reading ahead goes by
        the name of its reply, and takes its place."""
        self._orders = count()
        self._batch_lock = threading.Lock()

    def close(self) -> None:
        """Save what is worth keeping, free the context and the weights."""
        for stream in list(self._running):
            self._leave(stream, keep=True)
        while branch := self._next_unsaved():
            self.tree.save(branch)
        self.tree.close()
        self.drafter.close()
        self.context.close()
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
        if not request.anchor:
            for stream in [s for s in (*self._waiting, *self._running) if s.request.anchor]:
                self._leave(stream, keep=True)
        self._waiting.append(Stream(request, next(self._orders)))

    def cancel(self, request_id: str) -> None:
        """Ask a request to end; it does within one batch. May be called from any thread."""
        self._cancel(self._find(request_id))

    def cancel_all(self) -> None:
        """Ask all requests to end, as `cancel` does."""
        self._cancel([*tuple(self._waiting), *tuple(self._running)])

    def _cancel(self, streams: list[Stream]) -> None:
        for stream in streams:
            stream.cancelled = True
        with self._batch_lock:
            # A batch of several sequences moves the states of others (docs/engine-hazards.md).
            if len(self._in_batch) == 1 and self._in_batch[0].cancelled:
                self.context.abort()

    def finish_thinking(self, request_id: str) -> None:
        """End the thinking of a running reply soon ("answer now")."""
        for stream in self._find(request_id):
            stream.request.dial.finish_thinking()

    def set_budget(self, request_id: str, budget: int | None) -> None:
        """Give a running reply another budget of thinking tokens."""
        for stream in self._find(request_id):
            stream.request.dial.set_budget(budget)

    def _find(self, request_id: str) -> list[Stream]:
        streams = chain(tuple(self._waiting), tuple(self._running))
        return [stream for stream in streams if stream.request.id == request_id]

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
        )

    def save_one(self) -> bool:
        """Begin to write a conversation that changed, unless one is being written, in idle time.

        Returns:
            False if none is left.
        """
        if not self.tree.is_saving and (branch := self._next_unsaved()):
            self.tree.save(branch)
        return bool(self._unsaved)

    def _next_unsaved(self) -> Branch | None:
        while self._unsaved:
            _, branch = self._unsaved.popitem()
            if branch in self.tree.branches and not branch.busy:
                return branch
        return None

    # -- one round ------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Do one round: drop cancelled requests, admit, evaluate one batch, pick tokens."""
        outputs = self._sweep_cancelled()
        outputs += self._admit()
        self._draft()
        plan, starved = self._fit(
            plan_rows(self._running, self.options.n_batch, self.options.n_ubatch)
        )
        for stream in starved:
            outputs += self._end(stream, "length")
        if plan:
            outputs += self._evaluate(plan)
        return outputs

    def _draft(self) -> None:
        """Guess what answering streams will say, where nothing but the model decides that."""
        if not self.options.n_rs_seq:
            return
        guessing = [stream for stream in self._running if stream.may_guess]
        guesses = [self._guess(stream) for stream in guessing]
        for stream, drafts in zip(guessing, self.drafter.draft(guesses), strict=True):
            stream.drafts = drafts

    def _guess(self, stream: Stream) -> Guess:
        assert stream.branch is not None and stream.pending is not None
        n_left = self.context.n_ctx - stream.n_evaluated - 2
        if stream.request.max_tokens:
            n_left = min(n_left, stream.request.max_tokens - stream.n_completion - 1)
        return Guess(
            stream.branch.seq_id, stream.branch.tokens, stream.pending,
            max(0, min(n_left, stream.n_draft, self.options.n_draft)),
        )  # fmt: skip

    def _sweep_cancelled(self) -> list[Output]:
        gone = [s for s in (*self._waiting, *self._running) if s.cancelled]
        return [output for stream in gone for output in self._finish(stream, "cancelled")]

    def _admit(self) -> list[Output]:
        outputs: list[Output] = []
        for stream in sorted(self._waiting, key=lambda stream: stream.turn):
            if self._waits_for_leader(stream):
                continue
            if not self._find_place(stream):
                break  # later ones must not overtake it for ever
            branch = self.tree.acquire(self._admission.match(stream))
            if branch is None:
                break
            is_new = not stream.started
            self._start(stream, branch)
            if is_new and not stream.request.anchor:
                outputs.append((stream.request.id, stream.progress()))
        return outputs

    def _find_place(self, stream: Stream) -> bool:
        """Whether a stream can run now; background work is suspended for one in the foreground."""
        while not self._has_place(stream):
            victim = last_in_turn(self._running, than=stream)
            if victim is None:
                return False
            self._suspend(victim)
        return True

    def _has_place(self, stream: Stream) -> bool:
        if not self._running:
            return True
        if len(self._running) >= self.options.n_parallel:
            return False
        n_needed = self.tree.n_cells_needed(self._admission.match(stream)) + _MIN_REPLY_CELLS
        return n_needed <= self.tree.n_cells_obtainable()

    def _suspend(self, stream: Stream) -> None:
        """Take a stream's sequence away; it goes on when there is room again."""
        self._running.remove(stream)
        self.tree.release(stream.suspend())
        self._waiting.append(stream)

    def _waits_for_leader(self, stream: Stream) -> bool:
        """Whether a running prefill will soon hold more of this prompt than anything else does."""
        # Background work may itself be kept waiting for others.
        candidates = [s for s in self._running if s.turn[:2] <= stream.turn[:2]]
        found = self._admission.leader(stream, candidates)
        if found is None:
            return False
        leader, n_shared = found
        leader.stops.add(n_shared)
        return True

    def _start(self, stream: Stream, branch: Branch) -> None:
        self._admission.forget(stream)
        self._waiting.remove(stream)
        self._running.append(stream)
        stream.start(branch)
        if stream.sampler is None:
            settings = stream.request.sampling
            penalties = build_penalties(settings, self.model.n_vocab, self.model.vocab)
            stream.sampler = Sampler(settings, penalties)

    def _fit(self, plan: Plan) -> tuple[Plan, list[Stream]]:
        """Make room for a batch: who came last is suspended; who is alone has used it all up."""
        while plan and not self.tree.make_room(sum(len(row.tokens) for _, row in plan)):
            victim = last_in_turn(self._running)
            assert victim is not None
            if len(self._running) == 1:
                return [], [victim]
            self._suspend(victim)
            plan = [(stream, row) for stream, row in plan if stream is not victim]
        return plan, []

    def _evaluate(self, plan: Plan) -> list[Output]:
        outputs: list[Output] = []
        for part in separate_guesses(plan, self.options.n_ubatch):
            # A part that fails ends the streams of the others as well.
            if part := [(stream, row) for stream, row in part if stream in self._running]:
                outputs += self._evaluate_part(part)
        return outputs

    def _evaluate_part(self, plan: Plan) -> list[Output]:
        batch = [stream for stream, _ in plan]
        with self._batch_lock:
            self._in_batch = batch
        try:
            indices = self.drafter.decode([row for _, row in plan])
            picks = [self._advance(s, row, i) for (s, row), i in zip(plan, indices, strict=True)]
            self.drafter.follow(
                [(row, pick.n_kept) for (_, row), pick in zip(plan, picks, strict=True)]
            )
        except Aborted:
            return [output for stream in batch for output in self._break_off(stream)]
        except CacheFull as error:
            return [self._fail(stream, error) for stream in batch]
        except NanorunError as error:
            # The states of sequences beside the batch may have been on the move.
            outputs = [self._fail(stream, error) for stream in tuple(self._running)]
            self.tree.drop_idle()
            return outputs
        finally:
            with self._batch_lock:
                self._in_batch = []
                self.context.resume()
        return [o for s, pick in zip(batch, picks, strict=True) for o in self._conclude(s, pick)]

    # -- one stream -----------------------------------------------------------------------------

    def _advance(self, stream: Stream, row: Row, index: int | None) -> Pick:
        """Book what was evaluated; with logits, pick tokens as far as the guesses hold."""
        assert stream.branch is not None
        was_prefill = stream.in_prefill
        pick = Pick(n_kept=len(row.tokens) - row.n_drafts)
        if was_prefill and not stream.n_completion and not stream.request.anchor:
            n_read = stream.n_evaluated + pick.n_kept
            pick.events.append(stream.progress(n_read))
        if index is not None:
            self.picker.pick(stream, row, index, pick)
        self.tree.extend(
            stream.branch, row.tokens[: pick.n_kept], settled=pick.n_kept == len(row.tokens)
        )
        if pick.n_kept < len(row.tokens):
            n_back = len(row.tokens) - pick.n_kept
            self.context.roll_back(row.seq_id, stream.n_evaluated, n_back)
        return pick

    def _conclude(self, stream: Stream, pick: Pick) -> list[Output]:
        """What a batch came to for one stream, once its sequence is in order."""
        outputs: list[Output] = [(stream.request.id, event) for event in pick.events]
        if pick.failure is not None:
            return [*outputs, self._fail(stream, pick.failure)]
        if pick.reason is not None:
            return outputs + self._end(stream, pick.reason)
        if stream.n_evaluated in stream.stops:
            stream.stops.discard(stream.n_evaluated)
            assert stream.branch is not None
            self.tree.checkpoint(stream.branch)
        if stream.request.anchor and not stream.in_prefill:
            return self._finish(stream, "stop")
        return outputs

    def _end(self, stream: Stream, reason: FinishReason) -> list[Output]:
        """Flush the parser, then finish; a reply that calls tools says so."""
        request = stream.request
        outputs: list[Output] = [(request.id, event) for event in request.parser.finish()]
        if reason == "stop" and request.parser.n_tool_calls:
            reason = "tool_calls"
        return outputs + self._finish(stream, reason)

    def _finish(self, stream: Stream, reason: FinishReason, *, keep: bool = True) -> list[Output]:
        self._leave(stream, keep=keep)
        request = stream.request
        if request.anchor:
            return []
        event = Finished(reason, stream.usage(), stream.timings(), request.parser.stopped_by)
        return [(request.id, event)]

    def _break_off(self, stream: Stream) -> list[Output]:
        """End a stream in mid-batch; what it had read up to its last checkpoint stays."""
        assert stream.branch is not None
        keep = self.tree.cut_to_checkpoint(stream.branch)
        return self._finish(stream, "cancelled", keep=keep)

    def _fail(self, stream: Stream, error: NanorunError) -> Output:
        self._leave(stream, keep=False)
        return stream.request.id, error

    def _leave(self, stream: Stream, *, keep: bool) -> None:
        """Take a stream out of the engine; its sequence stays for later prompts if it is sound."""
        self._admission.forget(stream)
        (self._waiting if stream in self._waiting else self._running).remove(stream)
        if stream.sampler is not None:
            stream.sampler.close()
            stream.sampler = None
        if stream.branch is not None:
            if keep:
                self._note_unsaved(stream, stream.branch)
            self.tree.release(stream.branch, keep=keep)

    def _note_unsaved(self, stream: Stream, branch: Branch) -> None:
        """Remember a sequence that a later turn may begin with; forget those that were evicted."""
        held = set(self.tree.branches)
        self._unsaved = {name: other for name, other in self._unsaved.items() if other in held}
        self._unsaved[stream.request.id] = branch


def _round_up(n: int, multiple: int = 1024) -> int:
    return -(-n // multiple) * multiple
