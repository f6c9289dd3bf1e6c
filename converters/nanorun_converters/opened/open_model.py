"""The model of a conversion, opened and checked, wherever it comes from.

A folder, a repository on the Hub and a GGUF all end up as the same thing: a shape, the tensors that
make it, and what else the output's metadata needs.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanorun.errors import NanorunError
from nanorun.model.arch import HybridArch
from nanorun_converters.family.config import arch_from_config, text_config
from nanorun_converters.family.tokenizer import TOKENIZER_FILE, Vocabulary, read_vocabulary
from nanorun_converters.opened.from_gguf import is_gguf, open_gguf
from nanorun_converters.output.gguf_header import RawValue
from nanorun_converters.source.open import open_files, open_source
from nanorun_converters.source.scheme import CONFIG_FILE, Scheme, read_scheme
from nanorun_converters.source.source_model import Files, SourceModel
from nanorun_converters.tensors.names import TensorPlan, plan_tensors

GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A source model and all that a conversion takes from it."""

    source: SourceModel
    arch: HybridArch
    tensors: tuple[TensorPlan, ...]
    """In file order."""
    vocabulary: Vocabulary | None = None
    """None for a GGUF, and for a source model without a tokenizer, which can only be planned."""
    scheme: Scheme = field(default_factory=Scheme)
    """How the source's weights are quantized."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Its generation_config.json."""
    carried: Mapping[str, RawValue] | None = None
    """Metadata of the GGUF that is the source, if it is one."""


def open_model(
    origin: Path | Files, *, keep_mtp: bool = True, needs_weights: bool = True
) -> OpenedModel:
    """Open and check the model to be converted.

    Args:
        origin: The folder of a source model, a GGUF, or the files of one elsewhere.
        keep_mtp: Whether a multi-token prediction head comes along.
        needs_weights: Whether weights and tokenizer must be there; a plan does without.

    Raises:
        ModelError: If it is damaged or not supported.
    """
    if isinstance(origin, Path) and is_gguf(origin):
        gguf = open_gguf(origin, keep_mtp=keep_mtp)
        return OpenedModel(gguf.model, gguf.arch, tuple(gguf.tensors), carried=gguf.metadata)
    if isinstance(origin, Path):
        source = open_source(origin, needs_weights=needs_weights)
    else:
        source = open_files(origin, needs_weights=needs_weights)
    config = source.read_json(CONFIG_FILE)
    scheme = read_scheme(source, config)
    with for_source(source):
        where = str(source.folder / CONFIG_FILE)
        arch = arch_from_config(config, where, keep_mtp=keep_mtp)
    tensors = plan_tensors(source, arch, keep_mtp=keep_mtp)
    vocabulary = None
    if needs_weights or source.files.find(TOKENIZER_FILE) is not None:
        vocabulary = read_vocabulary(source, text_config(config), arch.n_vocab)
    generation = source.find_json(GENERATION_FILE) or {}
    return OpenedModel(source, arch, tuple(tensors), vocabulary, scheme, generation)


@contextmanager
def for_source(source: SourceModel) -> Iterator[None]:
    """Fill in SOURCE: a recipe or a config knows what would help, but not where it came from."""
    try:
        yield
    except NanorunError as error:
        argument = shlex.quote(source.files.argument)
        tries = [command.replace("SOURCE", argument) for command in error.tries]
        raise type(error)(error.message, facts=error.facts, tries=tries) from error
