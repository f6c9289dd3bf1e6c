"""Everything about a conversion that is decided before a weight is read.

Validates the whole source model first, so that a long job fails at its start or not for this
reason, and predicts the output to the byte.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nanorun.errors import ModelError, UsageError
from nanorun.model.arch import HybridArch
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import Role
from nanorun_converters.family.metadata import (
    SHA256_HEX_LENGTH,
    Provenance,
    build_metadata,
    merge_metadata,
)
from nanorun_converters.family.tokenizer import Vocabulary
from nanorun_converters.opened.open_model import OpenedModel, for_source, open_model
from nanorun_converters.options import ConvertOptions
from nanorun_converters.output.gguf_header import (
    AnyValue,
    Layout,
    RawValue,
    TensorSlot,
    lay_out,
    lay_out_split,
)
from nanorun_converters.source.scheme import Scheme
from nanorun_converters.source.source_model import Files, SourceModel
from nanorun_converters.tensors.names import Piece, TensorPlan
from nanorun_converters.tensors.nvfp4 import add_factors, keeps_blocks
from nanorun_converters.tensors.padding import pad_tensors
from nanorun_converters.types.search import SEARCHED, Target, search_types
from nanorun_quant.encode import Quantizer, choose_quantizer
from nanorun_quant.feedback import Feedbacks
from nanorun_quant.fit import Fit, fit_recipe
from nanorun_quant.ggml import NEED_IMATRIX, USE_NO_IMATRIX
from nanorun_quant.imatrix import Imatrix, per_expert
from nanorun_quant.imatrix_file import read_imatrix
from nanorun_quant.padding import Padding, padding_entries
from nanorun_quant.recipe import (
    Assignment,
    Recipe,
    parse_type_map,
    recipe_by_name,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

K = TypeVar("K", GgmlType, Role)

_SMALL = Assignment(GgmlType.F32, "small or sensitive, always f32")

FEEDBACK_MODES = ("auto", "never")

_ENTRY_BYTES = 160
"""Most that a tensor takes in the directory, in the search's table, and by alignment."""
_KEYS_BYTES = 8 * 1024
"""More than all other keys take, without vocabulary and templates."""


@dataclass(frozen=True, slots=True)
class RoleSummary:
    """What the tensors of one role, type and reason come to."""

    role: Role
    assignment: Assignment
    n_tensors: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """A source model, checked, and what becomes of each of its tensors."""

    source: SourceModel
    arch: HybridArch
    vocabulary: Vocabulary | None
    """None for a GGUF, and in a plan of a source model without its tokenizer."""
    recipe: Recipe
    tensors: tuple[TensorPlan, ...]
    """In file order."""
    assignments: Mapping[str, Assignment]
    """By the tensor's name."""
    out: Path
    padding: Padding = field(default_factory=dict)
    """Sizes that are larger in the file than in the source."""
    imatrix: Imatrix | None = None
    feedbacks: Feedbacks | None = None
    """How inputs go together, where errors are to be made up for."""
    scheme: Scheme = field(default_factory=Scheme)
    """How the source's weights are quantized."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """The source's generation_config.json."""
    split_max_bytes: int | None = None
    carried: Mapping[str, RawValue] | None = None
    """Metadata of the GGUF that is the source, if it is one."""
    search: Sequence[str] = ()
    """What a search found, `name=type:cost` a tensor."""
    quantizer: Quantizer = field(default_factory=Quantizer)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the output's size counts a tokenizer."""
        return self.vocabulary is not None or self.carried is not None

    @property
    def encoding(self) -> str:
        """What the file says about how its bytes were made."""
        return self.quantizer.label + (", error feedback" if self.feedbacks else "")

    def type_of(self, tensor: TensorPlan) -> GgmlType:
        """The type a tensor is written as."""
        return self.assignments[tensor.spec.name].type

    def n_bytes_of(self, tensor: TensorPlan) -> int:
        """Bytes of a tensor's data."""
        n_per_row = tensor.spec.n_per_row
        return tensor.spec.n_elements // n_per_row * self.type_of(tensor).row_bytes(n_per_row)

    @property
    def n_params(self) -> int:
        """Numbers in all tensors together, without the zeros of padding."""
        return sum(part.n_elements for tensor in self.tensors for part in tensor.parts)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors' data, without padding."""
        return sum(self.n_bytes_of(tensor) for tensor in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors; padding's bytes count, its zeros are no weights."""
        return 8 * self.tensor_bytes / self.n_params

    def weights_of(self, piece: Piece, n_per_row: int) -> NDArray[np.float32] | None:
        """How much the error of each column of a piece matters; None where all matter alike."""
        type_ = self.type_of(piece.plan)
        if type_ in USE_NO_IMATRIX:
            return None
        if self.imatrix is not None:
            found = self.imatrix.weights(piece.plan.spec.name, piece.i_part, n_per_row)
            if found is not None:
                return found
        # Blocks that an imatrix has not seen (MTP, the embedding) are made as if all inputs were
        # alike.
        return np.ones(n_per_row, np.float32) if type_ in NEED_IMATRIX else None

    def type_counts(self) -> dict[str, int]:
        """Tensors of each type, by the type's label, most first."""
        counts = Counter(self.type_of(tensor).label for tensor in self.tensors)
        return dict(counts.most_common())

    def by_role(self) -> list[RoleSummary]:
        """What each role becomes, most bytes first."""
        counts: Counter[tuple[Role, Assignment]] = Counter()
        sizes: Counter[tuple[Role, Assignment]] = Counter()
        for tensor in self.tensors:
            key = (tensor.spec.role, self.assignments[tensor.spec.name])
            counts[key] += 1
            sizes[key] += self.n_bytes_of(tensor)
        return [RoleSummary(*key, counts[key], n_bytes) for key, n_bytes in sizes.most_common()]

    def lay_out(self, hashes: Sequence[str] = ()) -> list[Layout]:
        """The header and directory of each file.

        Args:
            hashes: SHA-256 of each of the source's files; where not known yet, as many zeros take
                their place.
        """
        hashes = hashes or ["0" * SHA256_HEX_LENGTH] * len(self.source.stores)
        metadata = self._metadata(hashes)
        slots = [
            TensorSlot(t.spec.name, self.type_of(t), t.spec.shape, self.n_bytes_of(t))
            for t in self.tensors
        ]
        if self.split_max_bytes is None:
            return [lay_out(metadata, slots)]
        return lay_out_split(metadata, slots, self.split_max_bytes)

    def _metadata(self, hashes: Sequence[str]) -> Mapping[str, AnyValue]:
        about = (self._provenance(), hashes)
        if self.carried is not None:
            return merge_metadata(self.carried, self.source, self.arch, *about)
        return build_metadata(self.source, self.arch, self.vocabulary, self.generation, *about)

    def _provenance(self) -> Provenance:
        sizes = [(t, self.n_bytes_of(t)) for t in self.tensors]
        return Provenance(
            recipe=self.recipe.name,
            recipe_version=self.recipe.version,
            bytes_of_type=_sums((self.type_of(t), n_bytes) for t, n_bytes in sizes),
            bytes_of_role=_sums((t.spec.role, n_bytes) for t, n_bytes in sizes),
            n_params=self.n_params,
            quantizer=self.encoding,
            padding=tuple(padding_entries(self.padding)),
            search=self.search,
            imatrix=self.imatrix,
            only_weights=[
                tensor.spec.name
                for tensor in self.tensors
                if keeps_blocks(tensor, self.type_of(tensor))
                and self.scheme.only_weights(tensor.parts[0].name.rpartition(".")[0])
            ],
        )


def plan_conversion(origin: Path | Files, options: ConvertOptions) -> ConversionPlan:
    """Read and check a source model and decide every tensor's type.

    Args:
        origin: The folder of the source model, or its files elsewhere.
        options: What a person chose.

    Raises:
        UsageError: If the recipe or the type map cannot be meant, or does not fit the model.
        ModelError: If the source model is damaged or not supported.
    """
    recipe = recipe_by_name(options.recipe)
    overrides = parse_type_map(options.type_map)
    searches = options.target_bytes is not None or options.target_bpw is not None
    needs_weights = searches or not options.dry_run
    model = open_model(origin, keep_mtp=options.keep_mtp, needs_weights=needs_weights)
    source, tensors = model.source, model.tensors
    imatrix = _read_imatrix(options.imatrix, tensors)
    feedbacks = _feedbacks(options.feedback, imatrix, model.arch)
    target = _target(options, model)
    with for_source(source):
        if target is None:
            fit = fit_recipe(recipe, model.arch, options.pad, overrides)
        else:
            encoder = choose_quantizer(options.quantizer, SEARCHED).open()
            fit = search_types(
                tensors, model.arch, target, options.pad, imatrix, encoder, feedbacks
            )
    if imatrix is None and not options.dry_run:
        _refuse_without_imatrix(fit, source, options)
    with for_source(source):
        padded, assignments = add_factors(
            pad_tensors(tensors, model.arch, fit.arch),
            _with_small(fit.assignments, tensors),
            fit.arch,
        )
    types = {assignment.type for assignment in assignments.values()}
    return ConversionPlan(
        source=source, arch=fit.arch, vocabulary=model.vocabulary, recipe=fit.recipe,
        tensors=tuple(padded), assignments=assignments, scheme=model.scheme,
        generation=model.generation,
        split_max_bytes=options.split_max_bytes, carried=model.carried,
        out=_output_path(source, fit.recipe, options.out), padding=fit.padding, imatrix=imatrix,
        feedbacks=feedbacks if any(type_.is_quantized for type_ in types) else None,
        search=fit.table, quantizer=choose_quantizer(options.quantizer, types),
    )  # fmt: skip


def _with_small(
    assignments: Mapping[str, Assignment], tensors: Sequence[TensorPlan]
) -> dict[str, Assignment]:
    """Also those tensors that a recipe does not know of: biases and factors of a GGUF."""
    small = {t.spec.name: _SMALL for t in tensors if t.spec.name not in assignments}
    return {**assignments, **small}


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
        header += sum(len(value.raw) for value in (model.carried or {}).values())
        name = f"search-{options.target_bytes / 1e9:.4g}GB"
        return Target(max(0, options.target_bytes - header), name)
    if options.target_bpw is not None:
        if not math.isfinite(options.target_bpw):
            raise UsageError(f"--target-bpw {options.target_bpw}: expected a finite number")
        n_params = sum(part.n_elements for tensor in model.tensors for part in tensor.parts)
        return Target(int(options.target_bpw * n_params / 8), f"search-{options.target_bpw:g}bpw")
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


def _refuse_without_imatrix(fit: Fit, model: SourceModel, options: ConvertOptions) -> None:
    if not fit.needs_imatrix:
        return
    source, name = shlex.quote(model.files.argument), shlex.quote(f"{model.name}-q8_0.gguf")
    labels = " ".join(type_.label for type_ in fit.needs_imatrix)
    raise UsageError(
        f"recipe {fit.recipe.name} needs an imatrix",
        facts=[f"{labels}: without one, what so few bits keep is not what matters"],
        tries=[
            f"nanorun convert {source} --recipe q8_0 --out {name}",
            f"nanorun imatrix {name} --text TEXT --out imatrix.gguf",
            replace(options, imatrix=Path("imatrix.gguf")).command(model.files.argument),
        ],
    )


def _output_path(source: SourceModel, recipe: Recipe, out: Path | None) -> Path:
    default = f"{source.name}-{recipe.name}.gguf"
    try:
        return Path(default) if out is None else out / default if out.is_dir() else out
    except OSError as error:
        raise UsageError(f"--out {out}: {(error.strerror or str(error)).lower()}") from error


def _sums(pairs: Iterable[tuple[K, int]]) -> dict[K, int]:
    sums: Counter[K] = Counter()
    for key, n_bytes in pairs:
        sums[key] += n_bytes
    return dict(sums.most_common())
