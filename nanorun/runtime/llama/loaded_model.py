"""A loaded model: its vocabulary, its text form, its metadata."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from nanorun.chat.markup import BEGIN_TURN, CALL, END_CALL, END_TEXT, END_THINK, END_TURN
from nanorun.chat.template import ChatTemplate
from nanorun.errors import ModelError
from nanorun.model.arch import HybridArch
from nanorun.model.engine_options import EngineOptions
from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import GgufFile, read_gguf
from nanorun.model.gguf_arch import arch_from_gguf
from nanorun.model.tensor_roles import check_tensors
from nanorun.runtime.llama.binding import engine_log, load_llama
from nanorun.runtime.llama.engine_tokenizer import EngineTokenizer
from nanorun.runtime.llama.params import model_params, progress_hook
from nanorun.runtime.llama.token_cache import TokenCache
from nanorun.runtime.reply.grammar import GrammarCompiler
from nanorun.runtime.sampling.settings import SamplingSettings
from nanorun.tokens.token_list import Kind, TokenList
from nanorun.tokens.tokenizer import Tokenizer, trained_tokenizer

log = logging.getLogger(__name__)

_ENGINE_TOKENS = (
    "its tokenizer cannot be rebuilt exactly, so llama.cpp's is used: text with combining marks "
    "(Hindi, Bengali, Tamil, Thai, Burmese, vowelled Arabic and Hebrew, decomposed accents) may "
    "become other tokens than the model was trained on"
)
# llama.cpp's CPU backend lays weights of these types out anew at load time. Mapped as well, a file
# would then be in memory twice (measured: 24.4 GB for 17.8 GB of Q4_0, 18.2 GB without mmap).
_REPACKED = frozenset(
    {GgmlType.Q4_0, GgmlType.IQ4_NL, GgmlType.Q2_K, GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K}
)
_LOAD_WITHOUT_MMAP = 0  # LLAMA_LOAD_MODE_NONE
# Places of a file's data that its fingerprint looks at.
_N_SAMPLES = 64


def load_weights(llama: Any, path: Path, params: Any) -> Any:
    """The engine's handle of a model, None where it refuses the file; all files of a split one.

    The engine finds the other files by the name of the first only if that ends in lower case.
    """
    if path.suffix == ".gguf":
        return llama.llama_model_load_from_file(os.fsencode(path), params)
    paths = [os.fsencode(part.path) for part in read_gguf(path).parts]
    return llama.llama_model_load_from_splits(
        (ctypes.c_char_p * len(paths))(*paths), len(paths), params
    )


class LoadedModel:
    """Weights and vocabulary in the engine.

    The file is validated by `read_gguf` before llama.cpp sees it: its loader aborts on some
    malformed files instead of returning an error.

    Args:
        path: A GGUF file of the Nemotron-H family.
        options: `n_gpu_layers` and `n_cpu_moe` are used here; the rest sizes the context.

        writable: Keep the weights as they are in the file, and where they can be changed.
        progress: Told the part of the weights that is read, 0 to 1, a hundred times at most.

    Raises:
        ModelError: If the file is damaged, of another family, or refused by llama.cpp.
    """

    def __init__(
        self,
        path: Path,
        options: EngineOptions,
        *,
        writable: bool = False,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        started = time.monotonic()
        self.path = path
        self.gguf: GgufFile = read_gguf(path)
        self.arch: HybridArch = arch_from_gguf(self.gguf)
        # The engine loads a file that lacks some tensors without complaint.
        check_tensors(self.gguf, self.arch)
        self._llama = load_llama()
        params = model_params(self._llama, options)
        params.use_extra_bufts = not writable
        if writable or (not self._llama.llama_supports_gpu_offload() and self._is_repacked):
            params.load_mode = _LOAD_WITHOUT_MMAP
        if progress is not None:
            params.progress_callback = progress_hook(self._llama, progress)
        engine_log.clear()
        # Real vocabularies take seconds to be made a tokenizer of; the weights take as long.
        with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as beside:
            self._trained = beside.submit(trained_tokenizer, self.metadata)
            self.handle = load_weights(self._llama, path, params)
        if not self.handle:
            raise ModelError(
                f"{path.name} could not be loaded by llama.cpp", facts=engine_log.problems()
            )
        self.vocab = self._llama.llama_model_get_vocab(self.handle)
        self.n_vocab: int = self._llama.llama_vocab_n_tokens(self.vocab)
        self.load_s = time.monotonic() - started
        self.notices: list[str] = []
        """What people should know of this file before its first reply."""

    def close(self) -> None:
        """Free the weights; contexts of the model must be closed before."""
        if self.handle:
            self._llama.llama_model_free(self.handle)
            self.handle = None

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the file, or files: a digest of headers, sizes and some of the data."""
        digest = hashlib.blake2b(digest_size=16)
        for part in self.gguf.parts:
            n_header, n_file = part.data_offset, part.file_bytes
            with part.path.open("rb") as file:
                digest.update(file.read(n_header))
                for i in range(_N_SAMPLES):
                    file.seek(n_header + (n_file - n_header) * i // _N_SAMPLES)
                    digest.update(file.read(4096))
            digest.update(n_file.to_bytes(8, "little"))
        return digest.hexdigest()

    @property
    def metadata(self) -> dict[str, Any]:
        """The GGUF's key-value pairs."""
        return self.gguf.metadata

    @property
    def _is_repacked(self) -> bool:
        """Whether most weights are of types that the CPU backend copies."""
        copied = sum(t.n_bytes for t in self.gguf.tensors.values() if t.type in _REPACKED)
        return copied > self.gguf.file_bytes / 2

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template, with the texts that only it may turn into control tokens.

        Raises:
            ModelError: If the file carries no template.
        """
        source = self.metadata.get("tokenizer.chat_template")
        # Files of others carry the byte order mark of the file that the template came from.
        source = source.removeprefix("\ufeff") if isinstance(source, str) else ""
        if not source.strip():
            raise ModelError(
                f"{self.path.name} has no chat template",
                facts=["a file that is converted anew can be given that of the family"],
                tries=["nanorun convert SRC --chat-template family"],
            )
        specials = [text for text, _ in self._markup]
        return ChatTemplate(source, special_tokens=specials, name=self.path.name)

    def warm_up(self) -> None:
        """Do now what the first request would wait for: compile the template, find the markup.

        Raises:
            ModelError: If the template is unusable; the request that needs it will say so.
        """
        _ = self.template, self.control_tokens, self.end_tokens, self.tokenizer

    @cached_property
    def control_tokens(self) -> frozenset[int]:
        """Tokens that are markup, never text."""
        types = self.metadata.get("tokenizer.ggml.token_type", [])
        return frozenset(i for i, kind in enumerate(types) if kind == Kind.CONTROL)

    @property
    def _markup(self) -> list[tuple[str, int]]:
        """Control tokens, and user-defined ones that look like tags: their texts and types."""
        tokens = TokenList.from_metadata(self.metadata)
        return tokens.markup() if tokens else []

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a reply: what llama.cpp knows, and `</s>` beside `<|im_end|>`.

        A Nemotron file names only one of the two, and a model that says the other would run on
        (reference: generation_config.json's `eos_token_id` [2, 11]).
        """
        is_end = self._llama.llama_vocab_is_eog
        known = {token for token in self.control_tokens if is_end(self.vocab, token)}
        for text in (END_TEXT, END_TURN):
            known.update(self._single_token(text))
        return frozenset(known)

    @cached_property
    def call_tokens(self) -> tuple[int, int]:
        """Ids of `<tool_call>` and `</tool_call>`.

        Raises:
            ModelError: If the vocabulary has no such tokens, so tool calls cannot be forced.
        """
        found = [*self._single_token(CALL), *self._single_token(END_CALL)]
        if len(found) != 2:
            raise ModelError(f"{self.path.name} has no tokens for tool calls")
        return found[0], found[1]

    @cached_property
    def turn_token(self) -> int | None:
        """Id of `<|im_start|>`; None if the vocabulary has no such token."""
        return next(iter(self._single_token(BEGIN_TURN)), None)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Compiles grammars for this vocabulary."""
        ends = self._single_token(END_TURN)
        end = ends[0] if ends else int(self._llama.llama_vocab_eos(self.vocab))
        return GrammarCompiler(self.vocab, end)

    @cached_property
    def closing_after_text(self) -> tuple[int, ...]:
        r"""Tokens that end thinking where text stands before them (`\n</think>\n`)."""
        return tuple(self.tokenize(f"\n{END_THINK}\n", special=True))

    @cached_property
    def closing_after_newline(self) -> tuple[int, ...]:
        r"""Tokens that end thinking where a line has just ended (`</think>\n`)."""
        return tuple(self.tokenize(f"{END_THINK}\n", special=True))

    @property
    def bos(self) -> int:
        """The token that begins a text."""
        return int(self._llama.llama_vocab_bos(self.vocab))

    @property
    def adds_bos(self) -> bool:
        """Whether plain texts are to begin with BOS; rendered chats never do."""
        return bool(self._llama.llama_vocab_get_add_bos(self.vocab))

    @property
    def device(self) -> str:
        """Where the weights are: `cpu`, or the accelerators that the engine can use."""
        return "gpu" if self._llama.llama_supports_gpu_offload() else "cpu"

    @cached_property
    def sampling_defaults(self) -> SamplingSettings | None:
        """What the file (`general.sampling.*`) or its family's model card says about sampling.

        None for Nano, whose card has different values for each way of answering.
        """
        temperature = self.metadata.get("general.sampling.temp")
        if temperature is None:
            is_nano = not (self.arch.n_latent or self.arch.n_layer_nextn)
            return None if is_nano else SamplingSettings(1.0, 0.95)  # Super, Lightning
        top_p = self.metadata.get("general.sampling.top_p", 1.0)
        return SamplingSettings(float(temperature), float(top_p))

    def _single_token(self, text: str) -> list[int]:
        tokens = self.tokenize(text, special=True)
        return tokens if len(tokens) == 1 else []

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """As the model was trained where the file allows it, else llama.cpp's."""
        trained = self._trained.result()
        if trained is not None:
            return trained
        notice = f"{self.path.name}: {_ENGINE_TOKENS}"
        log.warning("%s", notice)
        self.notices.append(notice)
        return EngineTokenizer(self._llama, self.vocab, TokenList.from_metadata(self.metadata))

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text, without a BOS.

        Args:
            text: Any text.
            special: Whether control-token texts in it become control tokens.

        Raises:
            EngineError: If the tokenizer refuses the text.
        """
        return self.tokenizer.encode(text, special=special)

    @cached_property
    def tokenize_again(self) -> TokenCache:
        """`tokenize` for texts that are likely to come back."""
        return TokenCache(lambda text, special: self.tokenize(text, special=special), 2**25)

    @lru_cache(maxsize=4096)  # noqa: B019  # one model lives as long as its process
    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; control tokens give their text."""
        return self.tokenizer.piece(token)
