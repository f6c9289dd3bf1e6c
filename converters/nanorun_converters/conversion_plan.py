"""Everything about a conversion that is decided before a weight is read.

Validates the whole source model first, so that a long job fails at its start or not for this
reason, and predicts the output to the byte.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nanorun.errors import ModelError, UsageError
from nanorun.model.arch import HybridArch
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import Role
from nanorun_converters.family.metadata import (
    Provenance,
    build_metadata,
    merge_metadata,
    with_hashes,
)
from nanorun_converters.opened.open_model import OpenedModel, open_model
from nanorun_converters.options import ConvertOptions
from nanorun_converters.output.gguf_header import (
    AnyValue,
    Layout,
    TensorSlot,
    lay_out,
    lay_out_split,
)
from nanorun_converters.source.files import Files
from nanorun_converters.source.scheme import Scheme
from nanorun_converters.source.source_model import SourceModel
from nanorun_converters.tensors.nvfp4 import with_factors
from nanorun_converters.tensors.padding import pad_tensors
from nanorun_converters.tensors.tensor_plan import OutputTensor, TensorPlan, count_params
from nanorun_converters.types.search import SEARCHED, Target, search_types
from nanorun_quant.encode import Quantizer, choose_quantizer
from nanorun_quant.feedback import Feedbacks
from nanorun_quant.fit import Fit, fit_recipe
from nanorun_quant.imatrix import Imatrix, per_expert
from nanorun_quant.imatrix_file import read_imatrix
from nanorun_quant.padding import Padding, padding_entries
from nanorun_quant.recipe import KEPT_F32, Again
from nanorun_quant.recipe_names import parse_type_map, recipe_by_name

K = TypeVar("K", GgmlType, Role)

FEEDBACK_MODES = ("auto", "never")

_ENTRY_BYTES = 160
"""Most that a tensor takes in the directory, in the search's table, and by alignment."""
_KEYS_BYTES = 8 * 1024
"""More than all other keys take, without vocabulary and templates."""
_TOKENIZER = "tokenizer.ggml.model"


@dataclass(frozen=True, slots=True)
class RoleSummary:
    """What the tensors of one role, type and reason come to."""

    role: Role
    type: GgmlType
    reason: str
    n_tensors: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """A source model, checked, and what becomes of each of its tensors."""

    source: SourceModel
    arch: HybridArch
    """After padding."""
    recipe: str
    tensors: tuple[OutputTensor, ...]
    """In file order."""
    metadata: Mapping[str, AnyValue]
    """Every key of the file; the hashes of the source's files are still to be filled in."""
    out: Path
    padding: Padding
    """Sizes that are larger in the file than in the source."""
    imatrix: Imatrix | None
    feedbacks: Feedbacks | None
    """How inputs go together, where errors are to be made up for."""
    quantizer: Quantizer
    split_max_bytes: int | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was passed over or decided about the source, for a person to know."""
        return tuple(self.source.notes)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the output's size counts a tokenizer."""
        return _TOKENIZER in self.metadata

    @property
    def n_params(self) -> int:
        """Numbers in all tensors together, without the zeros of padding."""
        return count_params(self.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors' data, without what aligns them."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors; padding's bytes count, its zeros are no weights."""
        return 8 * self.tensor_bytes / self.n_params

    def type_counts(self) -> dict[str, int]:
        """Tensors of each type, by the type's label, most first."""
        counts = Counter(tensor.type.label for tensor in self.tensors)
        return dict(counts.most_common())

    def by_role(self) -> list[RoleSummary]:
        """What each role becomes, most bytes first."""
        counts: Counter[tuple[Role, GgmlType, str]] = Counter()
        sizes: Counter[tuple[Role, GgmlType, str]] = Counter()
        for tensor in self.tensors:
            key = (tensor.spec.role, tensor.type, tensor.reason)
            counts[key] += 1
            sizes[key] += tensor.n_bytes
        return [RoleSummary(*key, counts[key], n_bytes) for key, n_bytes in sizes.most_common()]

    def lay_out(self, hashes: Sequence[str] | None = None) -> list[Layout]:
        """The header and directory of each file.

        Args:
            hashes: SHA-256 of each of the source's files; None while they are not known, which
                gives headers of the same lengths.
        """
        metadata = self.metadata if hashes is None else with_hashes(self.metadata, hashes)
        slots = [TensorSlot(t.spec.name, t.type, t.spec.shape, t.n_bytes) for t in self.tensors]
        if self.split_max_bytes is None:
            return [lay_out(metadata, slots)]
        return lay_out_split(metadata, slots, self.split_max_bytes)


def plan_conversion(source: Path | Files, options: ConvertOptions) -> ConversionPlan:
    """Read and check a source model and decide every tensor's type.

    Args:
        source: The folder of the source model, or its files elsewhere.
        options: What a person chose.

    Raises:
        UsageError: If the recipe or the type map cannot be meant, or does not fit the model.
        ModelError: If the source model is damaged or not supported.
    """
    recipe, overrides = recipe_by_name(options.recipe), parse_type_map(options.type_map)
    searches = options.target_bytes is not None or options.target_bpw is not None
    model = open_model(source, options, needs_weights=searches or not options.dry_run)
    again = options.again(model.source.files.argument)
    imatrix = _read_imatrix(options.imatrix, model.tensors)
    feedbacks = _feedbacks(options.feedback, imatrix, model.arch)
    target = _target(options, model)
    if target is None:
        fit = fit_recipe(recipe, model.arch, options.pad, overrides, again=again)
    else:
        encoder = choose_quantizer(options.quantizer, SEARCHED).open()
        fit = search_types(
            model.tensors, model.arch, target, options.pad, imatrix, encoder, feedbacks,
            again=again,
        )  # fmt: skip
    if imatrix is None and not options.dry_run:
        _refuse_without_imatrix(fit, model.source, again)
    tensors = _output_tensors(model, fit, again)
    types = {tensor.type for tensor in tensors}
    if not any(type_.is_quantized for type_ in types):
        feedbacks = None
    quantizer = choose_quantizer(options.quantizer, types)
    return ConversionPlan(
        source=model.source, arch=fit.arch, recipe=fit.recipe.name, tensors=tensors,
        metadata=_metadata(model, fit, tensors, imatrix, encoding_of(quantizer, feedbacks)),
        out=_output_path(model.source, fit.recipe.name, options.out), padding=fit.padding,
        imatrix=imatrix, feedbacks=feedbacks, quantizer=quantizer,
        split_max_bytes=options.split_max_bytes,
    )  # fmt: skip


def encoding_of(quantizer: Quantizer, feedbacks: Feedbacks | None) -> str:
    """What the file says about how its bytes were made."""
    return quantizer.label + (", error feedback" if feedbacks else "")


def _output_tensors(model: OpenedModel, fit: Fit, again: Again) -> tuple[OutputTensor, ...]:
    padded = pad_tensors(model.tensors, model.arch, fit.arch, again=again)
    # A recipe knows nothing of the biases and factors that a GGUF may have.
    typed = [t.written_as(fit.assignments.get(t.spec.name, KEPT_F32)) for t in padded]
    return tuple(with_factors(typed, fit.arch, again=again))


def _metadata(
    model: OpenedModel,
    fit: Fit,
    tensors: Sequence[OutputTensor],
    imatrix: Imatrix | None,
    encoding: str,
) -> Mapping[str, AnyValue]:
    provenance = Provenance(
        recipe=fit.recipe.name,
        recipe_version=fit.recipe.version,
        bytes_of_type=_sums((t.type, t.n_bytes) for t in tensors),
        bytes_of_role=_sums((t.spec.role, t.n_bytes) for t in tensors),
        n_params=count_params(tensors),
        quantizer=encoding,
        padding=padding_entries(fit.padding),
        imatrix=imatrix,
        only_weights=_only_weights(tensors, model.scheme),
        search=fit.table,
        ignored_fields=model.ignored_fields,
    )
    if model.carried is not None:
        return merge_metadata(model.carried, model.source, fit.arch, provenance)
    return build_metadata(model.source, fit.arch, model.vocabulary, model.generation, provenance)


def _only_weights(tensors: Sequence[OutputTensor], scheme: Scheme) -> list[str]:
    """The NVFP4 tensors whose activations must keep more than 4 bits."""
    kept = [tensor for tensor in tensors if tensor.keeps_blocks]
    modules = [tensor.parts[0].name.rpartition(".")[0] for tensor in kept]
    return [t.spec.name for t, m in zip(kept, modules, strict=True) if scheme.only_weights(m)]


def _target(options: ConvertOptions, model: OpenedModel) -> Target | None:
    """What the search is to meet, if it is asked for.

    Raises:
        UsageError: If both a size and bits per weight are given.
    """
    if options.target_bytes is not None and options.target_bpw is not None:
        raise UsageError("--target-size and --target-bpw say the same in two ways: give one")
    if options.target_bytes is not None:
        # A file is its tensors, a directory of them, and metadata, which is mostly vocabulary.
        header = _ENTRY_BYTES * len(model.tensors) + _KEYS_BYTES
        if model.vocabulary is not None:
            texts = (*model.vocabulary.tokens, *model.vocabulary.merges)
            header += sum(_n_bytes(text) + 12 for text in texts)
            templates = model.vocabulary.chat_templates.values()
            header += sum(_n_bytes(text) for text in templates)
            header += _n_bytes(model.vocabulary.json)
        header += sum(len(value.raw) for value in (model.carried or {}).values())
        name = f"search-{options.target_bytes / 1e9:.4g}GB"
        return Target(max(0, options.target_bytes - header), name, header)
    if options.target_bpw is not None:
        if not math.isfinite(options.target_bpw):
            raise UsageError(f"--target-bpw {options.target_bpw}: expected a finite number")
        n_bytes = int(options.target_bpw * count_params(model.tensors) / 8)
        return Target(n_bytes, f"search-{options.target_bpw:g}bpw")
    return None


def _n_bytes(text: str) -> int:
    # What is no valid Unicode is refused by name when the header is laid out.
    return len(text.encode(errors="surrogatepass"))


def _read_imatrix(path: Path | None, tensors: Sequence[TensorPlan]) -> Imatrix | None:
    """The imatrix, checked against the source: it must know some of its tensors, in their widths.

    Raises:
        ModelError: If it is damaged, or of another model.
    """
    if path is None:
        return None
    n_experts = {t.spec.name: len(t.parts) for t in tensors if len(t.parts) > 1}
    imatrix = per_expert(read_imatrix(path), n_experts)
    if not any(tensor.spec.name in imatrix.entries for tensor in tensors):
        raise ModelError(f"{path}: it knows no tensor of this model")
    for tensor in tensors:
        imatrix.weights(tensor.spec.name, len(tensor.parts) - 1, tensor.spec.n_per_row)
    return imatrix


def _feedbacks(mode: str, imatrix: Imatrix | None, arch: HybridArch) -> Feedbacks | None:
    """How inputs go together, if that is known and wanted.

    Raises:
        UsageError: If there is no such mode.
    """
    if mode not in FEEDBACK_MODES:
        raise UsageError(
            f"there is no way of error feedback {mode!r}",
            facts=[f"ways: {' '.join(FEEDBACK_MODES)}"],
        )
    if mode == "never" or imatrix is None or not imatrix.grams:
        return None
    return Feedbacks(imatrix, is_latent=arch.n_latent > 0)


def _refuse_without_imatrix(fit: Fit, source: SourceModel, again: Again) -> None:
    if not fit.needs_imatrix:
        return
    argument, name = shlex.quote(source.files.argument), shlex.quote(f"{source.name}-q8_0.gguf")
    labels = " ".join(type_.label for type_ in fit.needs_imatrix)
    raise UsageError(
        f"recipe {fit.recipe.name} needs an imatrix",
        facts=[f"{labels}: without one, what so few bits keep is not what matters"],
        tries=[
            f"nanorun convert {argument} --recipe q8_0 --out {name}",
            f"nanorun imatrix {name} --text TEXT --out imatrix.gguf",
            again(imatrix=Path("imatrix.gguf")),
        ],
    )


def _output_path(source: SourceModel, recipe: str, out: Path | None) -> Path:
    default = f"{source.name}-{recipe}.gguf"
    try:
        return Path(default) if out is None else out / default if out.is_dir() else out
    except OSError as error:
        raise UsageError(f"--out {out}: {(error.strerror or str(error)).lower()}") from error


def _sums(pairs: Iterable[tuple[K, int]]) -> dict[K, int]:
    sums: Counter[K] = Counter()
    for key, n_bytes in pairs:
        sums[key] += n_bytes
    return dict(sums.most_common())
