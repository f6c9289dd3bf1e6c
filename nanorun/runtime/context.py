"""One llama.cpp context, with the hazards of hybrid memory guarded.

A hybrid context keeps two memories: attention cells (shared by sequences, removable from the tail)
and one recurrent state a sequence (all or nothing). What llama.cpp lets pass silently and is wrong
on such memory is not offered here: no middle removal, no shift, no partial removal without a state
for exactly that position. The rules and their measurements: docs/engine-hazards.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanorun.errors import EngineError, LibraryError, MemoryPlanError
from nanorun.model.ggml_type import GgmlType
from nanorun.runtime.library import engine_log, load_llama
from nanorun.runtime.model import LoadedModel
from nanorun.runtime.options import EngineOptions

_FLASH_ATTN_ENABLED = 1
_STATE_PARTIAL_ONLY = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: the recurrent part alone


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens that one sequence adds to a batch, at positions `pos`, `pos + 1`, ..."""

    seq_id: int
    pos: int
    tokens: Sequence[int]
    wants_logits: bool
    """Whether the logits after the last of them are wanted."""
    all_logits: bool = False
    """Whether the logits after each of them are wanted (scoring)."""


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
    ) -> None:
        self._llama = load_llama()
        self.model = model
        self.n_seq_max = options.n_seq_max
        self.n_batch = options.n_batch
        n_threads = options.n_threads or _physical_cores()
        params = self._llama.llama_context_default_params()
        params.n_ctx = options.n_ctx
        params.n_batch = options.n_batch
        params.n_ubatch = min(options.n_ubatch, options.n_batch)
        params.n_seq_max = options.n_seq_max
        params.n_rs_seq = 0
        # The default of 0 reserves n_batch rows of logits.
        params.n_outputs_max = n_outputs_max or options.n_seq_max
        params.n_outputs_max_per_seq = n_outputs_max or 1
        params.n_threads = params.n_threads_batch = n_threads
        # Without it the compute buffer grows with n_ctx x n_ubatch x heads: 67 GiB for Nano at 1M.
        params.flash_attn_type = _FLASH_ATTN_ENABLED
        params.type_k = int(GgmlType.from_name(options.type_k))
        params.type_v = int(GgmlType.from_name(options.type_v))
        params.kv_unified = True
        params.no_perf = True
        if eval_callback is not None:
            self._eval_callback = eval_callback  # ctypes keeps no reference
            params.cb_eval = eval_callback
        self.abort_when: Callable[[], bool] | None = None
        self._abort_callback = self._llama.ggml_abort_callback(self._should_abort)
        params.abort_callback = self._abort_callback
        engine_log.clear()
        self.handle = self._llama.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise MemoryPlanError(
                f"a context of {options.n_ctx} tokens could not be allocated",
                facts=engine_log.problems(),
                tries=[f"nanorun run {model.path} --n-ctx {max(512, options.n_ctx // 2)}"],
            )
        self.memory = self._llama.llama_get_memory(self.handle)
        self.n_ctx: int = self._llama.llama_n_ctx(self.handle)
        self._batch = _Batch(self._llama, options.n_batch)

    def close(self) -> None:
        """Free the context."""
        if self.handle:
            self._llama.llama_free(self.handle)
            self.handle = None

    def _should_abort(self, _data: object) -> bool:
        return self.abort_when is not None and self.abort_when()

    def decode(self, rows: Sequence[Row]) -> list[int | None]:
        """Evaluate the rows in one call.

        Returns:
            For each row the index to read its last logits by, None where none were wanted. With
            `all_logits` it is the index of the row's first token.

        Raises:
            CacheFull: If the cells do not suffice; nothing changed.
            Aborted: If `abort_when` said so.
            EngineError: If the backend failed.
        """
        outputs = self._batch.fill(rows)
        engine_log.clear()
        code = self._llama.llama_decode(self.handle, self._batch.struct)
        if code == 0:
            return outputs
        if code == 1:
            raise CacheFull("the KV cache is full")
        if code == 2:
            raise Aborted("the evaluation was aborted")
        raise EngineError(f"llama_decode failed with {code}", facts=engine_log.problems())

    def logits(self, index: int) -> NDArray[np.float32]:
        """Logits `(n_vocab,)` of one output of the last decode; a view until the next decode."""
        pointer = self._llama.llama_get_logits_ith(self.handle, index)
        return np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab,))

    def logits_of(self, index: int, n_rows: int) -> NDArray[np.float32]:
        """Logits `(n_rows, n_vocab)` of outputs that follow each other; a view, as above."""
        pointer = self._llama.llama_get_logits_ith(self.handle, index)
        return np.ctypeslib.as_array(pointer, shape=(n_rows, self.model.n_vocab))

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


class _Batch:
    """A `llama_batch` over numpy memory, filled without a Python loop over tokens."""

    def __init__(self, llama: object, n_max: int) -> None:
        self.tokens = np.zeros(n_max, np.int32)
        self.positions = np.zeros(n_max, np.int32)
        self.n_seq_ids = np.ones(n_max, np.int32)
        self.seq_ids = np.zeros(n_max, np.int32)
        self.seq_id_pointers = (
            np.arange(n_max, dtype=np.uint64) * 4 + np.uint64(self.seq_ids.ctypes.data)
        ).astype(np.uint64)
        self.outputs = np.zeros(n_max, np.int8)
        self.struct = llama.llama_batch()  # type: ignore[attr-defined]
        for field, array in (
            ("token", self.tokens), ("pos", self.positions), ("n_seq_id", self.n_seq_ids),
            ("seq_id", self.seq_id_pointers), ("logits", self.outputs),
        ):  # fmt: skip
            kind = dict(type(self.struct)._fields_)[field]
            setattr(self.struct, field, ctypes.cast(array.ctypes.data, kind))

    def fill(self, rows: Sequence[Row]) -> list[int | None]:
        """Lay the rows out one after the other; see `Context.decode` for what is returned."""
        n = 0
        outputs: list[int | None] = []
        for row in rows:
            end = n + len(row.tokens)
            self.tokens[n:end] = row.tokens
            self.positions[n:end] = np.arange(row.pos, row.pos + len(row.tokens))
            self.seq_ids[n:end] = row.seq_id
            self.outputs[n:end] = row.all_logits
            if row.wants_logits:
                self.outputs[end - 1] = 1
            outputs.append(n if row.all_logits else end - 1 if row.wants_logits else None)
            n = end
        self.struct.n_tokens = n
        return outputs


def _physical_cores() -> int:
    try:
        import psutil
    except ImportError as error:
        raise LibraryError("psutil is missing", tries=["pip install psutil"]) from error
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
