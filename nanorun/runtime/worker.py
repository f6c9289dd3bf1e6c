"""The child process that owns the engine: frames in on stdin, frames out on stdout.

A ggml abort, an out-of-memory kill or a corrupt file ends this process and nothing else. It ends
by itself when its parent does: stdin closes, and on Linux the kernel signals it as well.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nanorun.errors import EngineError, NanorunError
from nanorun.file_names import readable
from nanorun.model.chat import Event, Finished, ModelInfo, Notice, RawPrompt
from nanorun.runtime.beside import Beside, Done, Job
from nanorun.runtime.engine import request as engine_request
from nanorun.runtime.engine.engine import Engine
from nanorun.runtime.engine.forms import FREE, compile_form, needs_form
from nanorun.runtime.engine.prompts import is_short
from nanorun.runtime.engine.reading_ahead import ReadingAhead, Turn, begin_turn, prepare_readings
from nanorun.runtime.engine.request import prepare_request
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.measure.perplexity import score_text
from nanorun.runtime.process import wire
from nanorun.runtime.process.child_main import run_as_child
from nanorun.runtime.process.frames import (
    ANSWERS,
    REQUESTS,
    Answer,
    Cancel,
    ChangeSpare,
    Close,
    Detokenize,
    Failed,
    FinishThinking,
    Generate,
    Open,
    Ping,
    Pong,
    Progress,
    Ready,
    Render,
    Request,
    Said,
    Score,
    Scored,
    SetBudget,
    SpareChanged,
    Statistics,
    Stats,
    Tokenize,
)
from nanorun.runtime.process.heap import return_to_system
from nanorun.runtime.process.wire import MalformedFrame
from nanorun.runtime.texts import TextRequest, answer_text, is_quick

log = logging.getLogger(__name__)

# Idle time after which next turns are read ahead. Who asks again at once (agents, evaluations) must
# not find the engine busy with a guess.
_READ_AHEAD_AFTER_S = 0.5
# Idle time after which conversations that changed are written to disk.
_SAVE_AFTER_S = 2.0
# Between two of them; a save that goes on delays the next.
_SAVE_PAUSE_S = 0.05
_FLUSH_EVERY_S = 0.004


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the engine is asked for, and what its reader should know of it."""

    request: engine_request.Request
    notices: tuple[str, ...]


class Worker:
    """Reads requests, drives the engine, writes answers."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source = source
        self._sink = sink
        self._inbox: queue.SimpleQueue[Request | Done[Request]] = queue.SimpleQueue()
        self._engine: Engine | None = None
        self._turns: dict[str, Turn] = {}
        self._ahead = ReadingAhead()
        self._beside: Beside[Request] = Beside(self._inbox.put)
        self._sink_lock = threading.Lock()
        self._outbox = bytearray()
        self._gathering = False
        self._last_flush = 0.0
        self._n_steps = 0
        self._in_step = False
        self._closing = False

    def run(self) -> None:
        """Open the model that the first request names, then serve until told to close."""
        body = wire.read(self._source)
        if body is None:
            return
        opening = REQUESTS.decode(body)
        if not isinstance(opening, Open):
            raise EngineError(f"no model is open that could be asked to {opening}")
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            self._engine = self._open(opening)
        except NanorunError as error:
            self._send(Failed(opening.id, error))
            return
        self._send(Ready(opening.id, describe(self._engine)))
        with contextlib.suppress(NanorunError):
            self._engine.model.warm_up()
        self._serve(self._engine)
        self._beside.close()
        # Not after a failure: what was evaluated may differ from what the tree noted, and no such
        # state may be saved.
        self._engine.close()

    def _open(self, request: Open) -> Engine:
        if request.options.verbose:
            logging.getLogger().setLevel(logging.DEBUG)

        def progress(part: float) -> None:
            self._send(Progress(request.id, (part,)))

        model = LoadedModel(Path(request.path), request.options, progress=progress)
        return Engine(model, request.options)

    def _serve(self, engine: Engine) -> None:
        while True:
            while not engine.busy or not self._inbox.empty():
                request = self._next_request(engine)
                if isinstance(request, Close):
                    return
                self._handle(engine, request)
            self._n_steps += 1
            self._in_step = True
            outputs = engine.step()
            self._in_step = False
            if self._closing:
                return
            with self._one_write(engine):
                for request_id, output in outputs:
                    self._deliver(engine, request_id, output)

    def _next_request(self, engine: Engine) -> Request | Done[Request]:
        """Wait for a request, or for what is done beside; use the time that it takes to come."""
        with contextlib.suppress(queue.Empty):
            return self._inbox.get(timeout=_READ_AHEAD_AFTER_S)
        if self._read_ahead(engine):
            return self._inbox.get()
        with contextlib.suppress(queue.Empty):
            return self._inbox.get(timeout=_SAVE_AFTER_S - _READ_AHEAD_AFTER_S)
        while engine.save_one():
            with contextlib.suppress(queue.Empty):
                return self._inbox.get(timeout=_SAVE_PAUSE_S)
        return self._inbox.get()

    def _deliver(self, engine: Engine, request_id: str, output: Event | NanorunError) -> None:
        turn = self._turns.get(request_id)
        if isinstance(output, NanorunError):
            self._turns.pop(request_id, None)
            self._send(Failed(request_id, output))
            return
        if turn is not None:
            turn.reply.take(output)
        self._send(Said(request_id, output))
        if isinstance(output, Finished):
            self._turns.pop(request_id, None)
            is_complete = output.reason in ("stop", "length")
            if turn is not None and is_complete and engine.options.read_ahead:
                self._ahead.add(request_id, turn)

    def _read_ahead(self, engine: Engine) -> bool:
        """Begin to read what is known of a conversation's next turn; whether there is any."""
        found = self._ahead.next()
        if found is None:
            return False
        request_id, turn = found

        def prepare(job: Job[Request]) -> list[engine_request.Request]:
            return prepare_readings(request_id, engine.model, turn, job.check)

        def read(requests: list[engine_request.Request]) -> None:
            for request in requests:
                with contextlib.suppress(NanorunError):  # nobody asked for it, so nobody is told
                    engine.submit(request)
            if not engine.busy:
                self._read_ahead(engine)

        self._beside.begin("preparing", Job(request_id), prepare, read)
        return True

    def _listen(self) -> None:
        """Reader thread: signs of life and cancellations do not wait for the end of a batch."""
        with contextlib.suppress(BrokenPipeError):
            while (body := wire.read(self._source)) is not None:
                try:
                    self._hear(REQUESTS.decode(body))
                except MalformedFrame as error:
                    self._send(Failed(error.request_id, error))
        os._exit(0)  # the parent is gone: nobody is left to answer

    def _hear(self, request: Request) -> None:
        if isinstance(request, Ping):
            self._send(Pong(request.id, self._n_steps if self._in_step else None))
            return
        if isinstance(request, Cancel) and self._engine is not None:
            self._engine.cancel(request.id)
        elif isinstance(request, Close) and self._engine is not None:
            self._closing = True
            self._engine.cancel_all()  # a long batch would take the time to save
        self._inbox.put(request)

    def _handle(self, engine: Engine, request: Request | Done[Request]) -> None:
        try:
            self._answer(engine, request)
        except NanorunError as error:
            self._send(Failed(request.id, error))
        except Exception as error:  # a request that nobody foresaw must not end the others
            name = type(request).__name__
            log.exception("%s failed", name)
            self._send(Failed(request.id, EngineError(f"the engine failed at {name}: {error!r}")))

    def _answer(self, engine: Engine, request: Request | Done[Request]) -> None:
        match request:
            case Generate():
                self._prepare(engine, request)
            case Done():
                self._beside.take(request)
            case Cancel():
                if self._beside.cancel(request.id):
                    self._send(Said(request.id, Finished("cancelled")))
                engine.cancel(request.id)
            case FinishThinking() | SetBudget() if job := self._beside.find(request.id):
                job.controls.append(request)
            case FinishThinking():
                engine.finish_thinking(request.id)
            case SetBudget():
                engine.set_budget(request.id, request.n_tokens)
            case Tokenize() | Detokenize() | Render():
                self._answer_text(engine, request)
            case Stats():
                self._send(Statistics(request.id, engine.stats()))
            case ChangeSpare():
                self._change_spare(engine, request)
            case Score():
                self._score(engine, request)
            case _:
                raise EngineError(f"the engine has a model open and is asked to {request}")

    def _prepare(self, engine: Engine, asked: Generate) -> None:
        """Make the request that the engine takes; beside it, if that may take long."""
        prompt, options = asked.prompt, asked.options

        def prepare(job: Job[Request]) -> Prepared:
            form = compile_form(engine.model, options) if needs_form(options) else FREE
            request = prepare_request(asked.id, engine.model, prompt, options, form.form, job.check)
            return Prepared(request, (*form.notices, *request.notices))

        def submit(prepared: Prepared) -> None:
            for notice in prepared.notices:
                self._send(Said(asked.id, Notice(notice)))
            engine.submit(prepared.request)
            while engine.model.notices:
                self._send(Said(asked.id, Notice(engine.model.notices.pop(0))))
            messages = [] if isinstance(prompt, RawPrompt) else list(prompt)
            if (reading := self._ahead.interrupt(messages)) is not None:
                self._beside.cancel(reading)
            if messages:
                self._turns[asked.id] = begin_turn(messages, options)
            for control in job.controls:
                self._answer(engine, control)

        job: Job[Request] = Job(asked.id)
        if not needs_form(options) and is_short(prompt):
            submit(prepare(job))  # sooner than another thread would wake up
        else:
            self._beside.begin("preparing", job, prepare, submit)

    def _answer_text(self, engine: Engine, asked: TextRequest) -> None:
        def answer(job: Job[Request]) -> Answer:
            return answer_text(engine.model, asked, job.check)

        job: Job[Request] = Job(asked.id)
        if is_quick(asked):
            self._send(answer(job))
        else:
            self._beside.begin("preparing", job, answer, self._send)

    def _change_spare(self, engine: Engine, asked: ChangeSpare) -> None:
        n_before = engine.tree.spare_bytes
        engine.change_spare(asked.n_bytes)
        if asked.n_bytes < 0:
            return_to_system()
        n_held = engine.tree.spare_bytes
        freed_bytes = max(0, n_before - n_held)
        self._send(SpareChanged(asked.id, n_held, engine.tree.spare_limit_bytes, freed_bytes))

    def _score(self, engine: Engine, request: Score) -> None:
        def score(job: Job[Request]) -> Scored:
            def progress(n_done: int, n_total: int) -> None:
                self._send(Progress(request.id, (n_done, n_total)))

            result = score_text(
                engine.model, engine.options, request.text, request.n_ctx, progress, job.check
            )
            return Scored(request.id, result.n_tokens, result.ppl)

        self._beside.begin("scoring", Job(request.id), score, self._send)

    def _send(self, answer: Answer) -> None:
        frame = ANSWERS.encode(answer)
        with self._sink_lock:
            self._outbox += frame
            if not self._gathering:
                self._flush()

    def _flush(self) -> None:
        self._sink.write(self._outbox)
        self._sink.flush()
        self._outbox.clear()
        self._last_flush = time.monotonic()

    @contextlib.contextmanager
    def _one_write(self, engine: Engine) -> Iterator[None]:
        """Send what is said in a `with` block in one go, so that the reader wakes up once a batch.

        Batches that follow each other faster than anyone can read are sent together.
        """
        self._gathering = True
        try:
            yield
        finally:
            self._gathering = False
            is_due = time.monotonic() - self._last_flush > _FLUSH_EVERY_S
            if self._outbox and (is_due or not engine.busy):
                with self._sink_lock:
                    self._flush()


def describe(engine: Engine) -> ModelInfo:
    """What the opened model is."""
    model, metadata = engine.model, engine.model.metadata
    return ModelInfo(
        name=str(metadata.get("general.name") or readable(model.path.stem)),
        path=str(model.path),
        arch=str(metadata["general.architecture"]),
        n_params=sum(tensor.n_elements for tensor in model.gguf.tensors.values()),
        file_bytes=model.gguf.file_bytes,
        n_vocab=model.n_vocab,
        n_layer=model.arch.n_layer,
        n_ctx=engine.context.n_ctx,
        n_ctx_train=model.arch.n_ctx_train,
        n_seq_max=engine.options.n_seq_max,
        recipe=metadata.get("nanorun.recipe"),
        load_s=model.load_s,
        device=model.device,
    )


def main() -> None:
    """Serve on the standard streams."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    run_as_child(lambda source, sink: Worker(source, sink).run())


if __name__ == "__main__":
    main()
