"""config.json of a source model, turned into a `HybridArch`.

The only place that knows how Hugging Face spells sizes. Every field must be one that is read, one
whose only supported value is stated here, or one known not to change the maths; any other that is
set is refused by name, because a model converted without it would be silently wrong.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from nanorun.errors import ModelError, UsageError
from nanorun.model.arch import HybridArch, LayerKind, parse_pattern
from nanorun_quant.recipe import Again

ARCHITECTURES = ("NemotronHForCausalLM", "NemotronHPuzzleForCausalLM")
PUZZLE = ARCHITECTURES[1]
TEXT_PART = "llm_config"
"""Where the config of a model with eyes or ears keeps that of its language model."""
MTP_LAYERS = (LayerKind.ATTENTION, LayerKind.MOE)
"""The one form of an MTP head that the engine runs."""

N_CTX_LONG = 1_048_576
N_CTX_CAPPED = 262_144
"""NVIDIA states 1M tokens for Nemotron 3 but caps config.json here, to save memory by default."""

# All spellings: hybrid_override_pattern's letters as words, before and after transformers 5.17.
_KINDS = {
    "mamba": LayerKind.SSM,
    "linear_attention": LayerKind.SSM,
    "attention": LayerKind.ATTENTION,
    "full_attention": LayerKind.ATTENTION,
    "mlp": LayerKind.MLP,
    "moe": LayerKind.MOE,
}

_ALL_KINDS = _KINDS | {kind.value: kind for kind in LayerKind}
_MTP_LAYER_FIELDS = ("mtp_hybrid_override_pattern", "mtp_layers_block_type")
_BLOCK_FIELDS = {"block_type", "moe_intermediate_size", "num_experts_per_tok"}

# Fields that change the maths, and the values whose maths the engine implements.
_SUPPORTED_VALUES: dict[str, tuple[object, ...]] = {
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu",),
    "hidden_act": ("silu", None),
    "attention_bias": (False,),
    "use_bias": (False,),
    "mlp_bias": (False,),
    "mamba_proj_bias": (False,),
    "use_conv_bias": (True,),
    "mamba_conv_bias": (True,),
    "sliding_window": (None,),
    # The engine clamps dt nowhere. time_step_min, _max and _floor only initialise a new model.
    # JSON has no infinity: Python writes a bare word for it, transformers 5 an object.
    "time_step_limit": ([0, math.inf], [0, "Infinity"], [0, {"__float__": "Infinity"}]),
}

# Fields that do not change what the model computes.
_INERT = frozenset(
    """
    _name_or_path architectures model_type auto_map transformers_version torch_dtype dtype
    bos_token_id eos_token_id pad_token_id sep_token_id
    use_cache use_mamba_kernels num_logits_to_keep return_dict id2label label2id
    attention_dropout hidden_dropout initializer_range rescale_prenorm_residual
    output_router_logits router_aux_loss_coef
    time_step_min time_step_max time_step_floor
    mamba_dt_min mamba_dt_max mamba_dt_init_floor
    chunk_size mamba_chunk_size expand mamba_expand mamba_ssm_cache_dtype residual_in_fp32
    rope_theta rope_scaling rope_parameters partial_rotary_factor
    moe_shared_expert_overlap mtp_block_configs quantization_config
    attn_implementation _attn_implementation _attn_implementation_autoset _commit_hash
    unsloth_version unsloth_fixed trust_remote_code tokenizer_class model_max_length
    is_decoder pretraining_tp gradient_checkpointing
    problem_type finetuning_task num_labels
    """.split()  # noqa: SIM905
)
# How to draw tokens, not how to compute them: the fields of GenerationConfig, which transformers
# 5.24 takes out of any config.json that still has them.
_GENERATION = frozenset(
    """
    max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings
    do_sample num_beams num_beam_groups diversity_penalty num_return_sequences
    temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff penalty_alpha
    repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids renormalize_logits remove_invalid_values
    forced_bos_token_id forced_eos_token_id decoder_start_token_id
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias
    guidance_scale output_attentions output_hidden_states output_scores return_dict_in_generate
    """.split()  # noqa: SIM905
)


# Values that switch a field off, whatever it would do.
_OFF: tuple[object, ...] = (None, False, 0, "", [], {})


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the language model: all of it, in most."""
    part = config.get(TEXT_PART)
    return part if isinstance(part, dict) else config


def ignored_entries(config: dict[str, Any], ignored: Iterable[str]) -> tuple[str, ...]:
    """`name=value` of each field that was passed over, for the file's metadata.

    A field of single layers has no value of its own here: `name` alone.
    """
    text = text_config(config)
    return tuple(
        f"{name}={json.dumps(text[name], ensure_ascii=False):.200}" if name in text else name
        for name in ignored
    )


def arch_from_config(
    config: dict[str, Any],
    where: str,
    *,
    keep_mtp: bool = True,
    ignored: Collection[str] = (),
    again: Again | None = None,
) -> HybridArch:
    """The shape of the model that a config.json describes.

    Args:
        config: Its content.
        where: What to call it in errors.
        keep_mtp: Whether a multi-token prediction head is part of the model, or left out.
        ignored: Fields that are passed over, though it is not known what they do.
        again: Makes the commands that errors suggest, if there are any.

    Raises:
        ModelError: Naming the field that is missing, impossible or not supported.
        UsageError: If one of `ignored` is not there, or is a field that is understood.
    """
    text = text_config(config)
    fields = _Fields(
        text, where if text is config else f"{where}: {TEXT_PART}", frozenset(ignored), again
    )
    family = _family(fields, is_part=text is not config)
    blocks = _blocks(fields) if family == PUZZLE else []
    layers = _layers_of_blocks(fields, blocks) if blocks else _layers(fields)
    arch = HybridArch(
        layers=layers,
        n_vocab=fields.count("vocab_size"),
        n_embd=fields.count("hidden_size"),
        n_ctx_train=_n_ctx_train(fields),
        norm_eps=fields.number("layer_norm_epsilon", "norm_eps", "rms_norm_eps"),
        n_head=fields.count("num_attention_heads"),
        n_head_kv=fields.count("num_key_value_heads", "num_query_groups"),
        n_embd_head=fields.count("head_dim", "attention_head_dim"),
        ssm_d_conv=fields.count("conv_kernel", "mamba_d_conv"),
        ssm_d_inner=fields.count("mamba_num_heads") * fields.count("mamba_head_dim"),
        ssm_d_state=fields.count("ssm_state_size"),
        ssm_dt_rank=fields.count("mamba_num_heads"),
        ssm_n_group=fields.count("n_groups", "mamba_n_groups"),
        tied_embeddings=fields.flag("tie_word_embeddings", default=False),
        n_layer_nextn=_n_layer_nextn(fields, family, again) if keep_mtp else 0,
        **_mlp_sizes(fields, layers),
        **_expert_sizes(fields, layers, blocks),
    )
    fields.read.update({*_MTP_LAYER_FIELDS, "num_nextn_predict_layers"})
    fields.refuse_unread(_unknown_in_blocks(fields, blocks))
    try:
        arch.validate()
    except ModelError as error:
        raise ModelError(f"{where}: {error.message}", facts=error.facts) from error
    return arch


@dataclass(slots=True)
class _Fields:
    """A config whose fields are checked as they are read, and which remembers those read."""

    values: dict[str, Any]
    where: str
    ignored: Collection[str] = ()
    again: Again | None = None
    read: set[str] = field(default_factory=set)

    def find(self, *names: str) -> tuple[str, Any]:
        """The first of several spellings that is set, and its value; all must agree."""
        self.read.update(names)
        found = [(n, self.values[n]) for n in names if self.values.get(n) is not None]
        for name, value in found[1:]:
            if value != found[0][1]:
                self.refuse(name, f"{found[0][1]!r}, as {found[0][0]} says")
        return found[0] if found else (names[0], None)

    def count(self, *names: str, default: int | None = None) -> int:
        """A whole number that is not negative."""
        name, value = self.find(*names)
        value = default if value is None else value
        if type(value) is not int or not 0 <= value < 2**31:
            self.refuse(name, "a whole number")
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        """A finite number."""
        name, value = self.find(*names)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(name, "a number")
        if not math.isfinite(value):
            self.refuse(name, "a finite number")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """A truth value."""
        _, value = self.find(name)
        value = default if value is None else value
        if type(value) is not bool:
            self.refuse(name, "true or false")
        return value

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Say what a field should be and what it is."""
        found = f"{self.values[name]!r:.120}" if name in self.values else "no such field"
        raise ModelError(f"{self.where}: {name}: expected {expected}, found {found}")

    def refuse_unread(self, in_blocks: Iterable[str] = ()) -> None:
        """Refuse fields of unsupported value, and unknown ones that are set to anything.

        Args:
            in_blocks: Unknown fields of the layers, which may be passed over as well.
        """
        for name, supported in _SUPPORTED_VALUES.items():
            if name in self.values and self.values[name] not in supported:
                self.refuse(name, repr(supported[0]))
        unknown = self.values.keys() - self.read - _SUPPORTED_VALUES.keys() - _INERT - _GENERATION
        unknown = {name for name in unknown if self.values[name] not in _OFF}
        for name in self.ignored:
            if name not in unknown and name not in in_blocks:
                self._refuse_to_ignore(name)
        names = sorted(unknown.difference(self.ignored))
        if names:
            self.refuse_unknown(names[0], self.values[names[0]], others=names[1:])

    def refuse_unknown(self, name: str, value: object, *, others: Sequence[str] = ()) -> NoReturn:
        """Refuse a field of which nobody knows what it does, and say how to go on without it."""
        asked = dict.fromkeys((*self.ignored, name.rpartition(": ")[2], *others))
        raise ModelError(
            f"{self.where}: {name}: this field is not understood, and it may change"
            f" what the model computes (value {value!r:.80})",
            facts=[f"nor are: {', '.join(others)}"] if others else [],
            tries=[self.again(ignored_fields=tuple(asked))] if self.again else [],
        )

    def _refuse_to_ignore(self, name: str) -> NoReturn:
        if name in self.values:
            reason = "this field is understood; passing it over would change nothing or the model"
        else:
            reason = "there is no such field"
        raise UsageError(f"{self.where}: --ignore-field {name}: {reason}")


def _family(fields: _Fields, *, is_part: bool) -> str:
    _, names = fields.find("architectures")
    if is_part and names is None and fields.values.get("model_type") == "nemotron_h":
        names = [ARCHITECTURES[0]]
    found = [n for n in ARCHITECTURES if isinstance(names, list) and n in names]
    if not found:
        fields.refuse("architectures", f"[{ARCHITECTURES[0]!r}]")
    return found[0]


def _n_layer_nextn(fields: _Fields, family: str, again: Again | None) -> int:
    """MTP blocks that the engine can run; a head of another form is refused, never dropped."""
    n_layer = fields.count("num_nextn_predict_layers", default=0)
    if not n_layer:
        return 0
    tries = [again(keep_mtp=False)] if again else []
    if family == PUZZLE:
        raise ModelError(
            f"{fields.where}: the engine cannot run the MTP head of a Puzzle model", tries=tries
        )
    stated = [v for name in _MTP_LAYER_FIELDS if (v := fields.values.get(name)) is not None]
    if n_layer != 1 or any(_kinds_of(value) != MTP_LAYERS for value in stated):
        raise ModelError(
            f"{fields.where}: num_nextn_predict_layers: expected one attention and one MoE layer,"
            f" found {n_layer} MTP layers of {stated!r:.80}",
            tries=tries,
        )
    return n_layer


def _kinds_of(value: object) -> tuple[LayerKind | None, ...]:
    """The layers that a pattern or a list names; None for what is no kind of layer."""
    kinds = value if isinstance(value, (str, list)) else []
    return tuple(_ALL_KINDS.get(kind) if isinstance(kind, str) else None for kind in kinds)


def _blocks(fields: _Fields) -> list[dict[str, Any]]:
    """Puzzle's `block_configs`: the kind of each layer, and the sizes of its experts."""
    _, blocks = fields.find("block_configs")
    if not isinstance(blocks, list) or not blocks:
        fields.refuse("block_configs", "a list with one object a layer")
    for i, block in enumerate(blocks):
        if not isinstance(block, dict):
            raise ModelError(f"{fields.where}: block_configs[{i}]: expected an object")
        for name in sorted(_unknown_in_block(fields, block).difference(fields.ignored)):
            fields.refuse_unknown(f"block_configs[{i}]: {name}", block[name])
    return blocks


def _unknown_in_block(fields: _Fields, block: dict[str, Any]) -> set[str]:
    unknown = block.keys() - _BLOCK_FIELDS
    return {name for name in unknown if block[name] not in (None, False, fields.values.get(name))}


def _unknown_in_blocks(fields: _Fields, blocks: list[dict[str, Any]]) -> set[str]:
    return {name for block in blocks for name in _unknown_in_block(fields, block)}


def _layers_of_blocks(fields: _Fields, blocks: list[dict[str, Any]]) -> tuple[LayerKind, ...]:
    # These two describe the model before its layers were thinned out, or an MTP head as well.
    fields.read.update({"hybrid_override_pattern", "layers_block_type", "layer_types"})
    if fields.count("num_hidden_layers", default=len(blocks)) != len(blocks):
        fields.refuse("num_hidden_layers", f"{len(blocks)}, the layers of block_configs")
    return _layers_of_list(fields, "block_configs", [block.get("block_type") for block in blocks])


def _layers(fields: _Fields) -> tuple[LayerKind, ...]:
    _, pattern = fields.find("hybrid_override_pattern")
    name, kinds = fields.find("layers_block_type", "layer_types")
    if kinds is not None:
        layers = _layers_of_list(fields, name, kinds)
        if pattern is not None and pattern != "".join(layers):
            fields.refuse("hybrid_override_pattern", f"{''.join(layers)!r}, as {name} says")
    elif isinstance(pattern, str) and re.fullmatch(r"[ME*-]+", pattern):
        layers = parse_pattern(pattern)
    else:
        fields.refuse("hybrid_override_pattern", "a pattern of the letters M, E, * and -")
    if fields.count("num_hidden_layers", default=len(layers)) != len(layers):
        fields.refuse("num_hidden_layers", f"{len(layers)}, the layers of the pattern")
    return layers


def _layers_of_list(fields: _Fields, name: str, kinds: Any) -> tuple[LayerKind, ...]:
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        fields.refuse(name, "a list of layer kinds")
    for i, kind in enumerate(kinds):
        if kind not in _KINDS:
            raise ModelError(
                f"{fields.where}: {name}: layer {i}: expected one of {', '.join(_KINDS)},"
                f" found {kind!r:.60}"
            )
    return tuple(_KINDS[kind] for kind in kinds)


def _n_ctx_train(fields: _Fields) -> int:
    n_ctx = fields.count("max_position_embeddings")
    return max(n_ctx, N_CTX_LONG) if n_ctx >= N_CTX_CAPPED else n_ctx


def _mlp_sizes(fields: _Fields, layers: tuple[LayerKind, ...]) -> dict[str, Any]:
    # Also set, and unused, in models without dense layers.
    n_ff = fields.count("intermediate_size", default=0)
    return {"n_ff": n_ff if LayerKind.MLP in layers else 0}


def _expert_sizes(
    fields: _Fields, layers: tuple[LayerKind, ...], blocks: list[dict[str, Any]]
) -> dict[str, Any]:
    has_experts = LayerKind.MOE in layers
    required = None if has_experts and not blocks else 0
    sizes: dict[str, Any] = {
        "n_expert": fields.count(
            "n_routed_experts",
            "num_local_experts",
            "num_experts",
            default=None if has_experts else 0,
        ),
        "n_expert_used": fields.count("num_experts_per_tok", default=required),
        "n_expert_shared": fields.count("n_shared_experts", default=1),
        "n_ff_exp": fields.count("moe_intermediate_size", default=required),
        "n_ff_shexp": fields.count(
            "moe_shared_expert_intermediate_size", default=None if has_experts else 0
        ),
        "n_latent": fields.count("moe_latent_size", default=0),
        "expert_weights_scale": fields.number("routed_scaling_factor", default=1.0),
        "expert_weights_norm": fields.flag("norm_topk_prob", default=True),
        "n_expert_group": fields.count("n_group", default=1),
        "n_expert_group_used": fields.count("topk_group", default=1),
    }
    if blocks:
        sizes |= _sizes_per_layer(fields, layers, blocks)
    # A dense model's config may still carry the defaults of all of these.
    return sizes if has_experts else {}


def _sizes_per_layer(
    fields: _Fields, layers: tuple[LayerKind, ...], blocks: list[dict[str, Any]]
) -> dict[str, Any]:
    """Widths and counts that differ from layer to layer; the common value where they do not."""
    sizes: dict[str, Any] = {}
    names = {"n_ff_exp": "moe_intermediate_size", "n_expert_used": "num_experts_per_tok"}
    for size, name in names.items():
        per_layer = [
            _Fields(block, f"{fields.where}: block_configs[{i}]").count(name)
            if kind is LayerKind.MOE
            else 0
            for i, (kind, block) in enumerate(zip(layers, blocks, strict=True))
        ]
        found = [n for n, kind in zip(per_layer, layers, strict=True) if kind is LayerKind.MOE]
        sizes[size] = found[-1] if found else 0
        sizes[f"{size}_per_layer"] = tuple(per_layer) if len(set(found)) > 1 else ()
    return sizes
