"""The engine: requests in, events out, one thread.

`submit` queues a request, `step` does one round of work (admit, evaluate one batch, pick tokens)
and returns what happened, `cancel` and the dial's verbs change a running reply. The caller owns
the loop; `worker.py` is that caller in the product, tests drive it by hand.
"""

from __future__ import annotations

import time
from itertools import chain

from nanorun.errors import ContextFull, NanorunError
from nanorun.model.chat import Event, Finished, FinishReason
from nanorun.runtime.context import Aborted, Context, Row
from nanorun.runtime.model import LoadedModel
from nanorun.runtime.options import EngineOptions
from nanorun.runtime.prefix_tree import Branch, PrefixTree
from nanorun.runtime.request import Request
from nanorun.runtime.sampling import Sampler
from nanorun.runtime.scheduler import plan_rows, shared_prefix_leader
from nanorun.runtime.state_archive import Archive
from nanorun.runtime.state_store import open_store
from nanorun.runtime.stream import Stream

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
        self.context = Context(model, options)
        self.tree = PrefixTree(
            self.context,
            options.n_seq_max,
            self.context.n_ctx,
            Archive(options.archive_bytes, open_store(model, options)),
            options.checkpoint_bytes,
        )
        self._waiting: list[Stream] = []
        self._running: list[Stream] = []
        self._in_batch: list[Stream] = []
        self._unsaved: list[Branch] = []
        self.context.abort_when = self._all_cancelled

    def close(self) -> None:
        """Save what is worth keeping, free the context and the weights."""
        for stream in list(self._running):
            self._leave(stream, keep=True)
        while self.save_one():
            pass
        self.tree.close()
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
            raise ContextFull(
                f"the prompt has {n_prompt} tokens, but the context holds {n_ctx}",
                tries=[f"nanorun run {self.model.path} --n-ctx {_round_up(n_prompt + 1024)}"],
            )
        if not request.anchor:
            for stream in [s for s in (*self._waiting, *self._running) if s.request.anchor]:
                self._leave(stream, keep=True)
        self._waiting.append(Stream(request))

    def cancel(self, request_id: str) -> None:
        """Ask a request to end; it does within one batch. May be called from any thread."""
        for stream in self._find(request_id):
            stream.cancelled = True

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

    def save_one(self) -> bool:
        """Write one conversation that changed to disk, in idle time; False if none is left."""
        while self._unsaved:
            branch = self._unsaved.pop()
            if branch in self.tree.branches and not branch.busy:
                self.tree.save(branch)
                return True
        return False

    # -- one round ------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Do one round: drop cancelled requests, admit, evaluate one batch, pick tokens."""
        outputs = self._sweep_cancelled()
        outputs += self._admit()
        plan, starved = self._fit(
            plan_rows(self._running, self.options.n_batch, self.options.n_ubatch)
        )
        for stream in starved:
            outputs += self._end(stream, "length")
        if plan:
            outputs += self._evaluate(plan)
        return outputs

    def _sweep_cancelled(self) -> list[Output]:
        gone = [s for s in (*self._waiting, *self._running) if s.cancelled]
        return [output for stream in gone for output in self._finish(stream, "cancelled")]

    def _admit(self) -> list[Output]:
        outputs: list[Output] = []
        for stream in list(self._waiting):
            if len(self._running) >= self.options.n_parallel:
                break
            if self._waits_for_leader(stream):
                continue
            match = self.tree.best_match(stream.request.prompt)
            n_needed = len(stream.request.prompt) - match.n_tokens + _MIN_REPLY_CELLS
            if self._running and n_needed > self.tree.n_cells_obtainable():
                break  # later ones must not overtake it for ever
            branch = self.tree.acquire(stream.request.prompt)
            if branch is None:
                break
            self._start(stream, branch)
            if not stream.request.anchor:
                outputs.append((stream.request.id, stream.progress()))
        return outputs

    def _waits_for_leader(self, stream: Stream) -> bool:
        """Whether a running prefill will soon hold more of this prompt than anything else does."""
        found = shared_prefix_leader(
            stream.request.prompt,
            [(s.request.prompt, s.n_evaluated) for s in self._running],
            self.tree.best_match(stream.request.prompt).n_tokens,
        )
        if found is None:
            return False
        i_leader, n_shared = found
        self._running[i_leader].stops.add(n_shared)
        return True

    def _start(self, stream: Stream, branch: Branch) -> None:
        self._waiting.remove(stream)
        self._running.append(stream)
        stream.branch = branch
        stream.started = time.monotonic()
        stream.sampler = Sampler(stream.request.sampling, self.model.n_vocab)
        stream.stops |= {p for p in stream.request.boundaries if p > branch.n_tokens}

    def _fit(self, plan: Plan) -> tuple[Plan, list[Stream]]:
        """Make room for a batch; what cannot fit waits, or ends if nothing can ever free cells."""
        starved: list[Stream] = []
        while plan and not self.tree.make_room(sum(len(row.tokens) for _, row in plan)):
            stream, _ = plan.pop()  # prompts come last, the newest answer before them
            if not stream.in_prefill or len(self._running) == 1:
                starved.append(stream)
        return plan, starved

    def _evaluate(self, plan: Plan) -> list[Output]:
        self._in_batch = [stream for stream, _ in plan]
        try:
            indices = self.context.decode([row for _, row in plan])
        except Aborted:
            return [o for s in self._in_batch for o in self._finish(s, "cancelled", keep=False)]
        except NanorunError as error:
            return [self._fail(stream, error) for stream in self._in_batch]
        finally:
            self._in_batch = []
        outputs: list[Output] = []
        for (stream, row), index in zip(plan, indices, strict=True):
            outputs += self._advance(stream, row, index)
        return outputs

    def _all_cancelled(self) -> bool:
        batch = self._in_batch
        return bool(batch) and all(stream.cancelled for stream in batch)

    # -- one stream -----------------------------------------------------------------------------

    def _advance(self, stream: Stream, row: Row, index: int | None) -> list[Output]:
        """Book what was evaluated; with logits, pick the next token."""
        assert stream.branch is not None
        was_prefill = stream.in_prefill
        self.tree.extend(stream.branch, row.tokens)
        if stream.n_evaluated in stream.stops:
            stream.stops.discard(stream.n_evaluated)
            self.tree.checkpoint(stream.branch)
        if stream.request.anchor:
            return [] if stream.in_prefill else self._finish(stream, "stop")
        outputs: list[Output] = []
        if was_prefill:
            outputs.append((stream.request.id, stream.progress()))
        if index is not None:
            outputs += self._pick(stream, index)
        return outputs

    def _pick(self, stream: Stream, index: int) -> list[Output]:
        """Choose the token after the evaluated ones: a forced one, or a sampled one."""
        assert stream.sampler is not None
        request = stream.request
        if not stream.first_token:
            stream.first_token = time.monotonic()
        token = request.dial.forced()
        if token is None:
            token = stream.sampler.sample(self.context, index)
            if token in self.model.end_tokens and not request.ignore_eos:
                if not request.dial.rescue():
                    return self._end(stream, "stop")
                token = request.dial.forced()
                assert token is not None
        return self._take(stream, token)

    def _take(self, stream: Stream, token: int) -> list[Output]:
        """Append a token to the reply."""
        request = stream.request
        piece = self.model.piece(token)
        events = request.parser.feed(piece, control=token in self.model.control_tokens)
        request.dial.observe(piece, in_thinking=request.parser.in_thinking)
        stream.pending = token
        stream.n_completion += 1
        outputs: list[Output] = [(request.id, event) for event in events]
        if request.parser.stopped_by is not None:
            return outputs + self._end(stream, "stop")
        full = len(request.prompt) + stream.n_completion >= self.context.n_ctx
        if full or (request.max_tokens and stream.n_completion >= request.max_tokens):
            return outputs + self._end(stream, "length")
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

    def _fail(self, stream: Stream, error: NanorunError) -> Output:
        self._leave(stream, keep=False)
        return stream.request.id, error

    def _leave(self, stream: Stream, *, keep: bool) -> None:
        """Take a stream out of the engine; its sequence stays for later prompts if it is sound."""
        (self._waiting if stream in self._waiting else self._running).remove(stream)
        if stream.sampler is not None:
            stream.sampler.close()
            stream.sampler = None
        if stream.branch is not None:
            self._note_unsaved(stream, stream.branch)
            self.tree.release(stream.branch, keep=keep)

    def _note_unsaved(self, stream: Stream, branch: Branch) -> None:
        """Remember a sequence that the next turn will begin with, to be saved in idle time."""
        begins_next_turn = stream.request.anchor or not self.options.read_ahead
        if begins_next_turn and branch.n_tokens >= _MIN_SAVED_TOKENS:
            self._unsaved.append(branch)


def _round_up(n: int, multiple: int = 1024) -> int:
    return -(-n // multiple) * multiple
