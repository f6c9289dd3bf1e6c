"""The metadata of a GGUF: llama.cpp's keys for the shape and the tokenizer, and nanorun's own.

The only place, beside the reader in `nanorun.model`, that knows how GGUF spells keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanorun import __version__
from nanorun.model.arch import HybridArch, LayerKind
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import Role
from nanorun.tokens.definition import KEY_JSON
from nanorun_converters.family.tokenizer import Vocabulary
from nanorun_converters.output.gguf_header import (
    AnyValue,
    RawValue,
    Value,
    boolean,
    f32,
    i32,
    string,
    u32,
)
from nanorun_converters.source.source_model import SourceModel
from nanorun_quant.imatrix import Imatrix

QUANTIZATION_VERSION = 2
"""GGML_QNT_VERSION of ggml.h."""

SHA256_HEX_LENGTH = 64
_NEXTN = "nextn_predict_layers"
_PADDING = "nanorun.padding"
_HASHES = "nanorun.source.sha256"
TEMPLATE_KEY = "tokenizer.chat_template"
_IGNORED = "nanorun.ignored_fields"

# enum llama_ftype of llama.h for a file that is mostly of one type. The engine only prints it.
_FILE_TYPES = {
    GgmlType.F32: 0,
    GgmlType.F16: 1,
    GgmlType.Q4_0: 2,
    GgmlType.Q4_1: 3,
    GgmlType.Q8_0: 7,
    GgmlType.Q5_0: 8,
    GgmlType.Q5_1: 9,
    GgmlType.Q2_K: 10,
    GgmlType.Q3_K: 12,
    GgmlType.Q4_K: 14,
    GgmlType.Q5_K: 16,
    GgmlType.Q6_K: 18,
    GgmlType.IQ2_XXS: 19,
    GgmlType.IQ2_XS: 20,
    GgmlType.IQ3_XXS: 23,
    GgmlType.IQ4_NL: 25,
    GgmlType.IQ3_S: 26,
    GgmlType.IQ2_S: 29,
    GgmlType.IQ4_XS: 30,
    GgmlType.BF16: 32,
    GgmlType.MXFP4: 38,
    GgmlType.NVFP4: 39,
    GgmlType.Q2_0: 41,
}

# Sampling settings of generation_config.json that have a key of their own.
_SAMPLING_FLOATS = {"temperature": "temp", "top_p": "top_p", "min_p": "min_p"}


@dataclass(frozen=True, slots=True)
class Provenance:
    """How the file came to be."""

    recipe: str
    recipe_version: int
    bytes_of_type: Mapping[GgmlType, int]
    bytes_of_role: Mapping[Role, int]
    n_params: int
    quantizer: str
    """Whose code made the bytes."""
    padding: Sequence[str] = ()
    """`name:from:to` of each padded size."""
    imatrix: Imatrix | None = None
    only_weights: Sequence[str] = ()
    """NVFP4 tensors that want activations of more than 4 bits."""
    search: Sequence[str] = ()
    """What a search found, `name=type:cost` a tensor."""
    ignored_fields: Sequence[str] = ()
    """`name=value` of the fields of config.json that were passed over."""


def build_metadata(
    source: SourceModel,
    arch: HybridArch,
    vocabulary: Vocabulary | None,
    generation: Mapping[str, Any],
    provenance: Provenance,
) -> dict[str, Value]:
    """Every key of the file, in order; those of `with_hashes` to be filled in.

    Args:
        source: The source model.
        arch: Its shape.
        vocabulary: Its tokenizer; None to leave it out.
        generation: Its generation_config.json.
        provenance: What the conversion makes of it.
    """
    return {
        **_general(source, arch, provenance),
        **_precision(provenance.only_weights),
        **_sampling(generation),
        **{f"{arch.name}.{key}": value for key, value in shape_keys(arch).items()},
        **(tokenizer_keys(vocabulary) if vocabulary else {}),
        **_nanorun(source, arch, provenance),
        **_imatrix(provenance.imatrix),
        **_search(provenance),
    }


def merge_metadata(
    carried: Mapping[str, RawValue],
    source: SourceModel,
    arch: HybridArch,
    provenance: Provenance,
) -> dict[str, AnyValue]:
    """The keys of a file that is made from another GGUF: that one's, and what is different now."""
    general = _general(source, arch, provenance)
    changed = ("general.architecture", "general.file_type", "general.quantization_version")
    # The shape is stated anew, and without the head if that is left out.
    kept = {key: value for key, value in carried.items() if not key.endswith(_NEXTN)}
    own = _nanorun(source, arch, provenance)
    if _PADDING in carried and not provenance.padding:
        del own[_PADDING]
    return {
        **kept,
        **{key: general[key] for key in changed},
        **{f"{arch.name}.{key}": value for key, value in shape_keys(arch).items()},
        **own,
        **_imatrix(provenance.imatrix),
        **_search(provenance),
    }


def with_hashes(metadata: Mapping[str, AnyValue], hashes: Sequence[str]) -> dict[str, AnyValue]:
    """The metadata, once the SHA-256 of each of the source's files is known; no longer for that."""
    return {**metadata, _HASHES: string(tuple(hashes))}


def _general(source: SourceModel, arch: HybridArch, provenance: Provenance) -> dict[str, Value]:
    mostly = max(provenance.bytes_of_type, key=lambda t: provenance.bytes_of_type[t])
    return {
        "general.architecture": string(arch.name),
        "general.type": string("model"),
        "general.name": string(source.name),
        "general.size_label": string(_size_label(provenance.n_params)),
        "general.file_type": u32(_FILE_TYPES[mostly]),
        "general.quantization_version": u32(QUANTIZATION_VERSION),
    }


def _precision(only_weights: Sequence[str]) -> dict[str, Value]:
    if not only_weights:
        return {}
    return {
        "general.tensor_extra.name": string(tuple(only_weights)),
        "general.tensor_extra.prec_a4": boolean([False] * len(only_weights)),
    }


def _sampling(generation: Mapping[str, Any]) -> dict[str, Value]:
    keys: dict[str, Value] = {}
    top_k = generation.get("top_k")
    if type(top_k) is int and 0 <= top_k < 2**31:
        keys["general.sampling.top_k"] = i32(top_k)
    for name, key in _SAMPLING_FLOATS.items():
        value = generation.get(name)
        # A probability or a temperature; infinite and undefined ones fall out here too.
        is_flag = isinstance(value, bool)
        if isinstance(value, (int, float)) and not is_flag and 0 <= value < 1000:
            keys[f"general.sampling.{key}"] = f32(value)
    if generation.get("do_sample") is False and "temperature" not in generation:
        keys["general.sampling.temp"] = f32(0.0)  # greedy is what the model's maker asks for
    return keys


def shape_keys(arch: HybridArch) -> dict[str, Value]:
    """The keys of the shape, without their prefix."""
    heads_kv = [arch.n_head_kv if kind is LayerKind.ATTENTION else 0 for kind in arch.layers]
    # An MTP block attends and has experts, both.
    heads_kv += [arch.n_head_kv] * arch.n_layer_nextn
    keys = {
        "vocab_size": u32(arch.n_vocab),
        "block_count": u32(arch.n_layer_all),
        "context_length": u32(arch.n_ctx_train),
        "embedding_length": u32(arch.n_embd),
        # The engine tells the kinds of layers apart by these two arrays.
        "feed_forward_length": u32([_n_ff_at(arch, i) for i in range(arch.n_layer_all)]),
        "attention.head_count": u32(arch.n_head),
        "attention.head_count_kv": u32(heads_kv),
        "attention.key_length": u32(arch.n_embd_head),
        "attention.value_length": u32(arch.n_embd_head),
        "attention.layer_norm_epsilon": f32(arch.norm_eps),
        "attention.layer_norm_rms_epsilon": f32(arch.norm_eps),
        "ssm.conv_kernel": u32(arch.ssm_d_conv),
        "ssm.inner_size": u32(arch.ssm_d_inner),
        "ssm.state_size": u32(arch.ssm_d_state),
        "ssm.time_step_rank": u32(arch.ssm_dt_rank),
        "ssm.group_count": u32(arch.ssm_n_group),
    }
    if arch.n_layer_nextn:
        keys[_NEXTN] = u32(arch.n_layer_nextn)
    return keys | _experts(arch) if arch.n_expert else keys


def _n_ff_at(arch: HybridArch, i_layer: int) -> int:
    if i_layer >= arch.n_layer:
        return arch.n_ff_exp_at(i_layer)
    match arch.layers[i_layer]:
        case LayerKind.MLP:
            return arch.n_ff
        case LayerKind.MOE:
            return arch.n_ff_exp_at(i_layer)
        case _:
            return 0


def _experts(arch: HybridArch) -> dict[str, Value]:
    keys = {
        "expert_count": u32(arch.n_expert),
        "expert_used_count": _per_layer(arch, arch.n_expert_used, arch.n_expert_used_per_layer),
        "expert_shared_count": u32(arch.n_expert_shared),
        "expert_feed_forward_length": _per_layer(arch, arch.n_ff_exp, arch.n_ff_exp_per_layer),
        "expert_shared_feed_forward_length": u32(arch.n_ff_shexp),
        "expert_weights_norm": boolean(arch.expert_weights_norm),
        "expert_weights_scale": f32(arch.expert_weights_scale),
        "expert_group_count": u32(arch.n_expert_group),
        "expert_group_used_count": u32(arch.n_expert_group_used),
    }
    return keys | {"moe_latent_size": u32(arch.n_latent)} if arch.n_latent else keys


def _per_layer(arch: HybridArch, common: int, per_layer: tuple[int, ...]) -> Value:
    """One number where all layers agree, else one a block."""
    return u32([*per_layer, *[common] * arch.n_layer_nextn] if per_layer else common)


def tokenizer_keys(vocabulary: Vocabulary) -> dict[str, Value]:
    """The keys of a tokenizer and its chat templates."""
    keys = {
        "model": string("gpt2"),
        "pre": string(vocabulary.pre),
        "tokens": string(vocabulary.tokens),
        "token_type": i32(vocabulary.types),
        "merges": string(vocabulary.merges),
        **{f"{name}_token_id": u32(i) for name, i in vocabulary.special_ids.items()},
        # Always stated: the engine's default for these pre-tokenizers is to add BOS.
        "add_bos_token": boolean(vocabulary.add_bos),
        "add_eos_token": boolean(vocabulary.add_eos),
    }
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    whole = {KEY_JSON: string(vocabulary.json)} if vocabulary.json else {}
    return named | whole | _templates(vocabulary)


def _templates(vocabulary: Vocabulary) -> dict[str, Value]:
    templates = dict(vocabulary.chat_templates)
    keys = {}
    if "default" in templates:
        keys[TEMPLATE_KEY] = string(templates.pop("default"))
    if templates:
        keys["tokenizer.chat_templates"] = string(tuple(templates))
        keys |= {f"tokenizer.chat_template.{name}": string(t) for name, t in templates.items()}
    return keys


def _nanorun(source: SourceModel, arch: HybridArch, provenance: Provenance) -> dict[str, Value]:
    by_role = [f"{role.value}={n}" for role, n in provenance.bytes_of_role.items()]
    return {
        "nanorun.version": string(__version__),
        "nanorun.layer_pattern": string(arch.pattern),
        "nanorun.recipe": string(provenance.recipe),
        "nanorun.recipe_version": u32(provenance.recipe_version),
        "nanorun.quantizer": string(provenance.quantizer),
        "nanorun.source.repository": string(source.repository),
        "nanorun.source.revision": string(source.revision),
        "nanorun.source.files": string(tuple(store.name for store in source.stores)),
        # Not known before all of the source was read; as many zeros take their place.
        _HASHES: string(("0" * SHA256_HEX_LENGTH,) * len(source.stores)),
        _PADDING: string(tuple(provenance.padding)),
        **({_IGNORED: string(ignored)} if (ignored := tuple(provenance.ignored_fields)) else {}),
        "nanorun.bytes_by_role": string(by_role),
    }


def _imatrix(imatrix: Imatrix | None) -> dict[str, Value]:
    """llama-quantize's keys about the importance matrix."""
    if imatrix is None:
        return {}
    keys = {
        "file": string(Path(imatrix.name).name),
        "entries_count": u32(len(imatrix.entries)),
        "chunks_count": u32(imatrix.n_chunks),
    }
    if imatrix.datasets:
        keys["dataset"] = string(imatrix.datasets[-1])
    return {f"quantize.imatrix.{key}": value for key, value in keys.items()}


def _search(provenance: Provenance) -> dict[str, Value]:
    if not provenance.search:
        return {}
    importance = "importance"
    if provenance.imatrix is not None and provenance.imatrix.sensitivity:
        importance = "importance (corrected by measured sensitivity)"
    method = f"least sum of {importance} x relative output noise; Lagrangian over convex hulls"
    return {
        "nanorun.search.method": string(method),
        "nanorun.search.types": string(tuple(provenance.search)),
    }


def _size_label(n_params: int) -> str:
    for unit, label in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n_params >= unit:
            return f"{n_params / unit:.3g}{label}"
    return str(n_params)
