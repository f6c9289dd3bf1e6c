"""The model of a conversion, opened and checked, wherever it comes from.

A folder, a repository on the Hub and a GGUF all end up as the same thing: a shape, the tensors that
make it, and what else the output's metadata needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanorun.errors import UsageError
from nanorun.model.arch import HybridArch
from nanorun_converters.family.config import arch_from_config, ignored_entries, text_config
from nanorun_converters.family.metadata import TEMPLATE_KEY
from nanorun_converters.family.templates import DEFAULT, TEMPLATE_HINT, chosen_template
from nanorun_converters.family.tokenizer import (
    CHAT_STOP,
    TOKENIZER_FILE,
    Vocabulary,
    read_vocabulary,
)
from nanorun_converters.opened.from_gguf import is_gguf, open_gguf
from nanorun_converters.options import ConvertOptions
from nanorun_converters.output.gguf_header import RawValue, string
from nanorun_converters.source.files import Files
from nanorun_converters.source.open import open_source
from nanorun_converters.source.scheme import CONFIG_FILE, Scheme, read_scheme
from nanorun_converters.source.source_model import SourceModel
from nanorun_converters.tensors.names import has_head, plan_tensors
from nanorun_converters.tensors.tensor_plan import TensorPlan

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
    ignored_fields: tuple[str, ...] = ()
    """`name=value` of the fields of config.json that were passed over."""


def open_model(
    source: Path | Files, options: ConvertOptions, *, needs_weights: bool = True
) -> OpenedModel:
    """Open and check the model to be converted.

    Args:
        source: The folder of a source model, a GGUF, or the files of one elsewhere.
        options: Say whether a multi-token prediction head comes along.
        needs_weights: Whether weights and tokenizer must be there; a plan does without.

    Raises:
        ModelError: If it is damaged or not supported.
        UsageError: If an option cannot be meant for it.
    """
    keep_mtp, ignored = options.keep_mtp, tuple(dict.fromkeys(options.ignored_fields))
    choice = options.chat_template
    template = None if choice is None else chosen_template(choice)
    if isinstance(source, Path) and is_gguf(source):
        if ignored:
            raise UsageError(
                f"--ignore-field {ignored[0]}: {source} is a GGUF, without config.json"
            )
        gguf = open_gguf(source, keep_mtp=keep_mtp)
        carried = gguf.metadata
        if template is None and not gguf.has_template:
            gguf.model.tell(f"{source}: there is no chat template; {TEMPLATE_HINT}")
        if template is not None:
            carried = {**carried, TEMPLATE_KEY: RawValue(string(template).encode())}
        return OpenedModel(gguf.model, gguf.arch, tuple(gguf.tensors), carried=carried)
    opened = open_source(source, needs_weights=needs_weights)
    config = opened.read_json(CONFIG_FILE)
    scheme = read_scheme(opened, config)
    where, again = str(opened.origin / CONFIG_FILE), options.again(opened.files.argument)
    keep_mtp = keep_mtp and not lacks_head(opened, config)
    arch = arch_from_config(config, where, keep_mtp=keep_mtp, ignored=ignored, again=again)
    entries = ignored_entries(config, ignored)
    for entry in entries:
        opened.tell(f"{where}: {entry}: passed over, as --ignore-field says")
    tensors = plan_tensors(opened, arch, keep_mtp=keep_mtp)
    vocabulary = None
    if needs_weights or opened.files.find(TOKENIZER_FILE) is not None:
        vocabulary = read_vocabulary(opened, text_config(config), arch.n_vocab, template)
        _tell_of_missing_turns(opened, vocabulary)
    generation = opened.find_json(GENERATION_FILE) or {}
    return OpenedModel(
        opened, arch, tuple(tensors), vocabulary, scheme, generation, ignored_fields=entries
    )


def lacks_head(source: SourceModel, config: Mapping[str, Any]) -> bool:
    """Whether config.json states an MTP head of which there is no weight; then that is told.

    transformers 5.24 saves a model that had a head without it, and its config as it was.
    """
    stated = text_config(dict(config)).get("num_nextn_predict_layers")
    if not stated or has_head(source):
        return False
    where = source.origin / CONFIG_FILE
    source.tell(f"{where}: num_nextn_predict_layers: there are no mtp.* weights; left out")
    return True


def _tell_of_missing_turns(source: SourceModel, vocabulary: Vocabulary) -> None:
    """Say of a template whose end of a turn is no token: a reply would have no end."""
    if CHAT_STOP in vocabulary.chat_templates.get(DEFAULT, "") and (
        CHAT_STOP not in vocabulary.tokens
    ):
        source.tell(
            f"{source.origin / TOKENIZER_FILE}: the chat template ends turns with {CHAT_STOP},"
            " which is no token of this model"
        )
