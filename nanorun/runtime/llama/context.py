"""One llama.cpp context, with the hazards of hybrid memory guarded.

A hybrid context keeps two memories: attention cells (shared by sequences, removable from the tail)
and one recurrent state a sequence (all or nothing). What llama.cpp lets pass silently and is wrong
on such memory is not offered here: no middle removal, no shift, no partial removal without a state
for exactly that position. The rules and their measurements: docs/engine-hazards.md.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanorun.errors import EngineError, MemoryPlanError
from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.llama.binding import engine_log, load_llama
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.llama.params import context_params
from nanorun.runtime.llama.row import Row

_GO_ON, _STOP = b"0", b"1"
_CODE_NO_MEMORY = -2  # llama_decode's answer to GGML_STATUS_ALLOC_FAILED
_STATE_PARTIAL_ONLY = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: the recurrent part alone


class CacheFull(EngineError):
    """There is no room in the KV cache for a batch; nothing was evaluated."""


class Aborted(EngineError):
    """The abort callback stopped an evaluation; the sequences of the batch must be rebuilt."""


class Context:
    """A context of a loaded model.

    Args:
        model: The weights.
        options: Sizes.
        n_outputs_max: Rows of logits a single decode may give; llama.cpp reserves memory for each.
        eval_callback: A `ggml_backend_sched_eval_callback` that sees every operation.
        head_of: Open the context of the model's MTP head beside this main context.

    Raises:
        MemoryPlanError: If llama.cpp cannot allocate the context.
    """

    def __init__(
        self,
        model: LoadedModel,
        options: EngineOptions,
        *,
        n_outputs_max: int | None = None,
        eval_callback: Any = None,
        head_of: Context | None = None,
    ) -> None:
        self._llama = load_llama()
        self.model = model
        self.n_seq_max = options.n_seq_max
        self.n_rs_seq = options.n_rs_seq
        self.n_batch = options.n_batch
        params = context_params(
            self._llama, options, head=head_of is not None, n_outputs_max=n_outputs_max
        )
        if head_of is not None:
            params.ctx_other = head_of.handle
        if eval_callback is not None:
            self._eval_callback = eval_callback  # ctypes keeps no reference
            params.cb_eval = eval_callback
        self._abort_flag = ctypes.create_string_buffer(_GO_ON)
        params.abort_callback, params.abort_callback_data = _abort_hook(
            self._llama, self._abort_flag
        )
        engine_log.clear()
        self.handle: Any = self._llama.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise MemoryPlanError(
                f"a context of {options.n_ctx} tokens could not be allocated",
                facts=engine_log.problems(),
                tries=[f"nanorun run {model.path} --n-ctx {max(512, options.n_ctx // 2)}"],
            )
        self.memory = self._llama.llama_get_memory(self.handle)
        self.n_ctx: int = self._llama.llama_n_ctx(self.handle)
        self.n_embd: int = self._llama.llama_model_n_embd(model.handle)
        self._batch = _Batch(self._llama, options.n_batch, self.n_embd if head_of else 0)
        self._logits_address = _logits_address(self._llama)
        self._logits_views: dict[tuple[int, int], NDArray[np.float32]] = {}
        """By address and rows: making a view takes longer than finding a token in it, and llama.cpp
        puts its outputs into the same few places again and again."""

    def close(self) -> None:
        """Free the context."""
        if self.handle:
            self._llama.llama_free(self.handle)
            self.handle = None

    def abort(self) -> None:
        """Make the running `decode` end soon with `Aborted`; may be called from any thread.

        On a CPU it ends at the next operation, elsewhere at the end of the batch. It holds for
        later decodes too, until `resume`.
        """
        self._abort_flag.value = _STOP

    def resume(self) -> None:
        """Let the next `decode` run."""
        self._abort_flag.value = _GO_ON

    def decode(
        self, rows: Sequence[Row], hidden: NDArray[np.float32] | None = None
    ) -> list[int | None]:
        """Evaluate the rows in one call.

        Args:
            rows: Tokens to evaluate.
            hidden: For the context of an MTP head: the hidden state before each token, `(n_tokens,
                n_embd)`.

        Returns:
            For each row the index of its first logits, None where none were wanted: those of its
            first token with `all_logits`, else those of the last token that is not guessed.

        Raises:
            CacheFull: If the cells do not suffice; nothing changed.
            Aborted: If `abort` was called.
            MemoryPlanError: If a buffer could not be allocated.
            EngineError: If the backend failed.
        """
        outputs = self._batch.fill(rows, hidden)
        engine_log.clear()
        code = self._llama.llama_decode(self.handle, self._batch.struct)
        if code == 0:
            return outputs
        if code == 1:
            raise CacheFull("the KV cache is full")
        if code == _CODE_NO_MEMORY:
            n_tokens = sum(len(row.tokens) for row in rows)
            raise MemoryPlanError(
                f"memory ran out while {n_tokens} tokens were evaluated",
                facts=engine_log.problems(),
            )
        if code == 2:
            raise Aborted("the evaluation was aborted")
        raise EngineError(f"llama_decode failed with {code}", facts=engine_log.problems())

    def logits(self, index: int) -> NDArray[np.float32]:
        """Logits `(n_vocab,)` of one output of the last decode; a view until the next decode."""
        logits: NDArray[np.float32] = self.logits_of(index, 1)[0]
        return logits

    def logits_of(self, index: int, n_rows: int) -> NDArray[np.float32]:
        """Logits `(n_rows, n_vocab)` of outputs that follow each other; a view, as above.

        Raises:
            EngineError: If the last decode has no logits there.
        """
        address = self._logits_address(self.handle, index)
        if address is None:
            raise EngineError(f"the last batch has no logits at {index}")
        view: NDArray[np.float32] | None = self._logits_views.get((address, n_rows))
        if view is None:
            pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
            shape = n_rows, self.model.n_vocab
            view = self._logits_views[address, n_rows] = np.ctypeslib.as_array(pointer, shape=shape)
        return view

    def keep_hidden_states(self, *, only_outputs: bool = False) -> None:
        """Keep the hidden states that an MTP head needs, of all tokens or those with logits."""
        from llama_cpp import llama_cpp_ext

        llama_cpp_ext.llama_set_embeddings_nextn(self.handle, True, only_outputs)

    def hidden_states(self, n_tokens: int) -> NDArray[np.float32]:
        """Hidden states `(n_tokens, n_embd)` of the last decode, in the order of its tokens."""
        from llama_cpp import llama_cpp_ext

        pointer = llama_cpp_ext.llama_get_embeddings_nextn(self.handle)
        return np.ctypeslib.as_array(pointer, shape=(n_tokens, self.n_embd)).copy()

    def hidden_state(self, index: int) -> NDArray[np.float32]:
        """Hidden state `(n_embd,)` of one output of the last decode."""
        from llama_cpp import llama_cpp_ext

        pointer = llama_cpp_ext.llama_get_embeddings_nextn_ith(self.handle, index)
        return np.ctypeslib.as_array(pointer, shape=(self.n_embd,)).copy()

    # -- sequences ------------------------------------------------------------------------------

    def drop(self, seq_id: int) -> None:
        """Forget a whole sequence; always possible."""
        self._llama.llama_memory_seq_rm(self.memory, seq_id, -1, -1)

    def fork(self, source: int, target: int) -> None:
        """Make `target` a copy of all of `source`; cells are shared, the state is copied on write.

        A fork of an earlier position needs a state of that position: see `fork_at`. `target` must
        be empty.
        """
        self._llama.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def fork_at(self, source: int, target: int, n_tokens: int, state: bytes) -> None:
        """Make `target` the first `n_tokens` of `source`, given the recurrent state of there.

        `seq_cp` copies the recurrent state of the source's *end* whatever range it is given, so
        the saved one is put over it. `target` must be empty.
        """
        self._llama.llama_memory_seq_cp(self.memory, source, target, 0, n_tokens)
        self._set_state(target, state, _STATE_PARTIAL_ONLY)

    def rewind(self, seq_id: int, n_tokens: int, state: bytes) -> None:
        """Shorten a sequence to its first `n_tokens`, given the recurrent state of there."""
        self._set_state(seq_id, state, _STATE_PARTIAL_ONLY)
        self.remove_tail(seq_id, n_tokens)

    def keep(self, kept: Sequence[tuple[Row, int]]) -> None:
        """Keep so many tokens of each row of the last batch, and take the others back."""
        for row, n_kept in kept:
            if n_kept < len(row.tokens):
                self.roll_back(row.seq_id, row.pos + n_kept, len(row.tokens) - n_kept)

    def roll_back(self, seq_id: int, n_tokens: int, n_back: int) -> None:
        """Take back the last `n_back` tokens of the last batch, which leaves `n_tokens`.

        llama.cpp reports success for more than it can take back, and a sequence that was rolled
        back must be evaluated, or settled, before it is copied.
        """
        if not 0 < n_back <= self.n_rs_seq:
            raise EngineError(f"{n_back} tokens cannot be taken back, only {self.n_rs_seq}")
        self.remove_tail(seq_id, n_tokens)

    def settle(self, seq_id: int) -> None:
        """Make a rollback final, by writing the state it points at over the current one."""
        self._set_state(seq_id, self.recurrent_state(seq_id), _STATE_PARTIAL_ONLY)

    def remove_tail(self, seq_id: int, n_tokens: int) -> None:
        """Leave the first `n_tokens` of a sequence without recurrent state, or after `roll_back`'s
        checks.
        """
        if not self._llama.llama_memory_seq_rm(self.memory, seq_id, n_tokens, -1):
            raise EngineError(f"sequence {seq_id} could not be shortened to {n_tokens} tokens")

    def recurrent_state(self, seq_id: int) -> bytes:
        """The recurrent state at the end of a sequence; small and of fixed size."""
        return self._get_state(seq_id, _STATE_PARTIAL_ONLY)

    def full_state(self, seq_id: int) -> bytes:
        """KV and recurrent state of a sequence, to be put back by `restore`."""
        return self._get_state(seq_id, 0)

    def restore(self, seq_id: int, state: bytes) -> None:
        """Fill an empty sequence from `full_state`."""
        self._set_state(seq_id, state, 0)

    def _get_state(self, seq_id: int, flags: int) -> bytes:
        size = self._llama.llama_state_seq_get_size_ext(self.handle, seq_id, flags)
        buffer = (ctypes.c_uint8 * size)()
        n = self._llama.llama_state_seq_get_data_ext(self.handle, buffer, size, seq_id, flags)
        if n != size:
            raise EngineError(f"the state of sequence {seq_id} could not be read")
        return bytes(buffer)

    def _set_state(self, seq_id: int, state: bytes, flags: int) -> None:
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        n = self._llama.llama_state_seq_set_data_ext(self.handle, buffer, len(state), seq_id, flags)
        if n != len(state):
            raise EngineError(
                f"a saved state of {len(state)} bytes does not fit sequence {seq_id}",
                facts=engine_log.problems(),
            )


def _abort_hook(llama: Any, flag: ctypes.Array[ctypes.c_char]) -> tuple[object, ctypes.c_void_p]:
    """A `ggml_abort_callback` and its data that read the flag without entering Python.

    ggml asks before every operation; a Python callback would take the interpreter's lock some
    hundred times a batch (measured on pico: 0.2 ms of 0.6 ms a token). libc's `atoi` is a function
    that returns what is written at an address.
    """
    libc = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
    callback = ctypes.cast(libc.atoi, llama.ggml_abort_callback)
    return callback, ctypes.cast(flag, ctypes.c_void_p)


def _logits_address(llama: Any) -> Any:
    """`llama_get_logits_ith` giving the address as a number (None for NULL), not a pointer object.

    The library is asked for the function by name, which makes one of our own: the types of the one
    that llama_cpp has set up stay as they are.
    """
    function = llama._lib["llama_get_logits_ith"]
    function.argtypes = [llama.llama_context_p_ctypes, ctypes.c_int32]
    function.restype = ctypes.c_void_p
    return function


class _Batch:
    """A `llama_batch`, filled without a Python loop over tokens.

    Most rows add one token; ctypes arrays take it in a third of the time that numpy's take.
    """

    def __init__(self, llama: object, n_max: int, n_embd: int) -> None:
        int32s = ctypes.c_int32 * n_max
        self.tokens, self.positions, self.seq_ids = int32s(), int32s(), int32s()
        self.n_seq_ids = int32s(*[1] * n_max)
        first = ctypes.addressof(self.seq_ids)
        self.seq_id_pointers = (ctypes.c_size_t * n_max)(*range(first, first + 4 * n_max, 4))
        self.outputs = (ctypes.c_int8 * n_max)()
        self.struct = llama.llama_batch()  # type: ignore[attr-defined]
        for field, array in (
            ("token", self.tokens), ("pos", self.positions), ("n_seq_id", self.n_seq_ids),
            ("seq_id", self.seq_id_pointers), ("logits", self.outputs),
        ):  # fmt: skip
            kind = dict(type(self.struct)._fields_)[field]
            setattr(self.struct, field, ctypes.cast(array, kind))

        self.hidden = np.zeros((n_max, n_embd), np.float32)
        if n_embd:
            kind = dict(type(self.struct)._fields_)["embd"]
            self.struct.embd = ctypes.cast(self.hidden.ctypes.data, kind)

    def fill(self, rows: Sequence[Row], hidden: NDArray[np.float32] | None) -> list[int | None]:
        """Lay the rows out one after the other; see `Context.decode` for what is returned."""
        if hidden is not None:
            self.hidden[: len(hidden)] = hidden
        start = 0
        outputs: list[int | None] = []
        for row in rows:
            n_tokens = len(row.tokens)
            end = start + n_tokens
            self.tokens[start:end] = [*row.tokens]
            self.positions[start:end] = list(range(row.pos, row.pos + n_tokens))
            self.seq_ids[start:end] = [row.seq_id] * n_tokens
            first = self._first_output(row, start, end)
            self.outputs[start:end] = [i >= first for i in range(start, end)]
            outputs.append(first if first < end else None)
            start = end
        self.struct.n_tokens = start
        return outputs

    def _first_output(self, row: Row, start: int, end: int) -> int:
        """Where the logits begin that a row asks for; `end` if it asks for none."""
        if row.all_logits:
            return start
        return end - 1 - row.n_drafts if row.wants_logits else end
