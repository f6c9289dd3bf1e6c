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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from nanorun.errors import EngineError, NanorunError
from nanorun.model.chat import Event, Finished, GenerateOptions, ModelInfo
from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.engine.engine import Engine
from nanorun.runtime.engine.reading_ahead import ReadingAhead, Turn
from nanorun.runtime.engine.request import compile_constraint, needs_constraint, prepare_request
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.measure.perplexity import score_text
from nanorun.runtime.process import wire
from nanorun.runtime.process.child_main import run_as_child

log = logging.getLogger(__name__)

Frame = dict[str, Any]

# Idle time after which conversations that changed are written to disk.
_SAVE_AFTER_S = 2.0
# Between two of them; a save that goes on delays the next.
_SAVE_PAUSE_S = 0.05
_FLUSH_EVERY_S = 0.004


class Worker:
    """Reads verbs, drives the engine, writes events."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source = source
        self._sink = sink
        self._inbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._engine: Engine | None = None
        self._turns: dict[str, Turn] = {}
        self._ahead = ReadingAhead()
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="compiler")
        self._compiling: set[str] = set()
        """Requests whose grammar is not compiled yet."""
        self._sink_lock = threading.Lock()
        self._outbox = bytearray()
        self._gathering = False
        self._last_flush = 0.0
        self._n_steps = 0
        self._in_step = False
        self._closing = False

    def run(self) -> None:
        """Open the model named by the first frame, then serve until told to close."""
        opening = wire.read(self._source)
        if opening is None:
            return
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            self._engine = self._open(opening)
        except NanorunError as error:
            self._send(opening["id"], wire.error_to_json(error))
            return
        info = asdict(describe(self._engine))
        self._send(opening["id"], {"kind": "ready", "info": info})
        with contextlib.suppress(NanorunError):
            self._engine.model.warm_up()
        self._serve(self._engine)
        # Not after a failure: what was evaluated may differ from what the tree noted, and no such
        # state may be saved.
        self._engine.close()

    def _open(self, frame: Frame) -> Engine:
        options = EngineOptions(**frame["options"])
        if options.verbose:
            logging.getLogger().setLevel(logging.DEBUG)
        return Engine(LoadedModel(Path(frame["path"]), options), options)

    def _serve(self, engine: Engine) -> None:
        while True:
            while not engine.busy or not self._inbox.empty():
                if self._inbox.empty():
                    self._read_ahead(engine)
                    if engine.busy:
                        break
                frame = self._next_frame(engine)
                if frame["verb"] == "close":
                    return
                self._handle(engine, frame)
            self._n_steps += 1
            self._in_step = True
            outputs = engine.step()
            self._in_step = False
            if self._closing:
                return
            with self._one_write(engine):
                for request_id, output in outputs:
                    self._deliver(engine, request_id, output)

    def _next_frame(self, engine: Engine) -> Frame:
        """Wait for a frame; when none comes for a while, use the time to save."""
        with contextlib.suppress(queue.Empty):
            return self._inbox.get(timeout=_SAVE_AFTER_S)
        while engine.save_one():
            with contextlib.suppress(queue.Empty):
                return self._inbox.get(timeout=_SAVE_PAUSE_S)
        return self._inbox.get()

    def _deliver(self, engine: Engine, request_id: str, output: Event | NanorunError) -> None:
        turn = self._turns.get(request_id)
        if isinstance(output, NanorunError):
            self._turns.pop(request_id, None)
            self._send(request_id, wire.error_to_json(output))
            return
        if turn is not None:
            turn.take(output)
        self._send(request_id, wire.event_to_json(output))
        if isinstance(output, Finished):
            self._turns.pop(request_id, None)
            is_complete = output.reason in ("stop", "length")
            if turn is not None and is_complete and engine.options.read_ahead:
                self._ahead.add(request_id, turn)

    def _read_ahead(self, engine: Engine) -> None:
        """Use idle time to read what is known of next turns, one conversation at a time."""
        while not engine.busy and (requests := self._ahead.next(engine.model)) is not None:
            for request in requests:
                with contextlib.suppress(NanorunError):  # nobody asked for it, so nobody is told
                    engine.submit(request)

    def _listen(self) -> None:
        """Reader thread: signs of life and cancellations do not wait for the end of a batch."""
        with contextlib.suppress(BrokenPipeError):
            while (frame := wire.read(self._source)) is not None:
                if frame["verb"] == "ping":
                    n_steps = self._n_steps if self._in_step else None
                    self._send(frame["id"], {"kind": "pong", "n_steps": n_steps})
                    continue
                if frame["verb"] == "cancel" and self._engine is not None:
                    self._engine.cancel(frame["id"])
                elif frame["verb"] == "close" and self._engine is not None:
                    self._closing = True
                    self._engine.cancel_all()  # a long batch would take the time to save
                self._inbox.put(frame)
        os._exit(0)  # the parent is gone: nobody is left to answer

    def _handle(self, engine: Engine, frame: Frame) -> None:
        request_id, verb = frame["id"], frame["verb"]
        try:
            if verb == "generate":
                self._generate(engine, frame)
            elif verb == "cancel":
                self._compiling.discard(request_id)
                engine.cancel(request_id)
            elif verb == "finish_thinking":
                engine.finish_thinking(request_id)
            elif verb == "set_budget":
                engine.set_budget(request_id, frame["budget"])
            elif verb == "tokenize":
                tokens = engine.model.tokenize(frame["text"], special=frame["special"])
                self._send(request_id, {"kind": "result", "value": tokens})
            elif verb == "stats":
                self._send(request_id, {"kind": "result", "value": asdict(engine.stats())})
            elif verb == "score":
                self._score(engine, frame)
            else:
                raise EngineError(f"the engine does not know the verb {verb!r}")
        except NanorunError as error:
            self._send(request_id, wire.error_to_json(error))
        except Exception as error:  # a request that nobody foresaw must not end the others
            log.exception("%s failed", verb)
            failure = EngineError(f"the engine failed at {verb}: {error!r}")
            self._send(request_id, wire.error_to_json(failure))

    def _generate(self, engine: Engine, frame: Frame) -> None:
        request_id, options = frame["id"], wire.options_from_json(frame["options"])
        if "constraint" not in frame:
            if needs_constraint(options):
                self._compile(engine, frame, options)
                return
        elif request_id not in self._compiling:  # cancelled meanwhile
            self._send(request_id, wire.event_to_json(Finished("cancelled")))
            return
        self._compiling.discard(request_id)
        constraint = frame.get("constraint")
        if isinstance(constraint, NanorunError):
            raise constraint
        messages = [wire.message_from_json(m) for m in frame["messages"]]
        request = prepare_request(
            request_id, engine.model, messages, options, constraint, n_ctx=engine.context.n_ctx
        )
        engine.submit(request)
        self._ahead.interrupt(messages)
        self._turns[request_id] = Turn(messages, options)

    def _compile(self, engine: Engine, frame: Frame, options: GenerateOptions) -> None:
        """Compile a grammar in another thread; the frame comes back with it."""

        def compile_it() -> None:
            try:
                constraint: object = compile_constraint(engine.model, options)
            except NanorunError as error:
                constraint = error
            except Exception as error:  # nobody else would say so, and the request would wait
                constraint = EngineError(f"the grammar could not be compiled: {error!r}")
            self._inbox.put({**frame, "constraint": constraint})

        self._compiling.add(frame["id"])
        self._compiler.submit(compile_it)

    def _score(self, engine: Engine, frame: Frame) -> None:
        def progress(n_done: int, n_total: int) -> None:
            self._send(frame["id"], {"kind": "progress", "n_done": n_done, "n_total": n_total})

        result = score_text(engine.model, engine.options, frame["text"], frame["n_ctx"], progress)
        self._send(frame["id"], {"kind": "result", "value": asdict(result)})

    def _send(self, request_id: str, payload: Frame) -> None:
        frame = wire.pack({"id": request_id, **payload})
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
        name=str(metadata.get("general.name") or model.path.stem),
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
