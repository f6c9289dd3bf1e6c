"""llama.cpp's presets (`Q4_K_M`, ...), as they are where every row is whole blocks.

The rules are those of `llama_tensor_get_type_impl` in llama.cpp's src/llama-quant.cpp, without an
imatrix, and without the fallbacks that make Nano's "Q4_K_M" a mix of Q5_0 and Q8_0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from nanorun.model.ggml_type import GgmlType as T
from nanorun.model.tensor_roles import Role, TensorSpec
from nanorun_quant.recipe import Recipe, Types

# llama_ftype_get_default_type: the type of what no rule names.
PRESETS: dict[str, T] = {
    "Q6_K": T.Q6_K, "Q5_K_M": T.Q5_K, "Q5_K_S": T.Q5_K, "Q4_K_M": T.Q4_K, "Q4_K_S": T.Q4_K,
    "Q3_K_L": T.Q3_K, "Q3_K_M": T.Q3_K, "Q3_K_S": T.Q3_K, "Q2_K": T.Q2_K, "Q2_K_S": T.Q2_K,
    "IQ4_XS": T.IQ4_XS, "IQ4_NL": T.IQ4_NL, "IQ3_M": T.IQ3_S, "IQ3_S": T.IQ3_S, "IQ3_XS": T.IQ3_S,
    "IQ3_XXS": T.IQ3_XXS, "IQ2_M": T.IQ2_S, "IQ2_S": T.IQ2_XS, "IQ2_XS": T.IQ2_XS,
    "IQ2_XXS": T.IQ2_XXS, "MXFP4_MOE": T.MXFP4, "Q8_0": T.Q8_0, "Q5_1": T.Q5_1, "Q5_0": T.Q5_0,
    "Q4_1": T.Q4_1, "Q4_0": T.Q4_0,
}  # fmt: skip
"""Preset to its main type."""

_STAND_INS = {
    T.Q6_K: T.Q8_0, T.Q5_K: T.Q5_1, T.IQ2_XXS: T.Q2_0,
    **dict.fromkeys(
        (T.Q4_K, T.IQ4_XS, T.Q3_K, T.IQ3_S, T.IQ3_XXS, T.Q2_K, T.IQ2_S, T.IQ2_XS), T.IQ4_NL
    ),
}  # fmt: skip
"""The smallest type of short blocks that is as good as one of blocks of 256, for rows that have
none and are not padded. llama.cpp takes Q5_0 for Q4_K, Q4_0 below, and the same above."""

_BLOCK = re.compile(r"blk\.(\d+)\.")
_DOWN_ROLES = (Role.EXPERT_DOWN, Role.SHARED_DOWN, Role.FFN_DOWN)


def preset_by_name(name: str) -> Recipe | None:
    """The recipe of a preset, in llama.cpp's spelling or in lower case; None if there is none."""
    key = name.upper()
    if key not in PRESETS:
        return None
    rules = partial(_types_by_tensor, key)
    return Recipe(
        key, 1, PRESETS[key], summary=f"llama.cpp's {key} without fallbacks", by_tensor=rules
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor stands, as the rules count."""

    i_layer: int
    i_down: int
    n_layer: int
    i_attention: int
    n_attention: int
    n_expert: int


def _types_by_tensor(preset: str, specs: Sequence[TensorSpec]) -> Mapping[str, Types]:
    n_layer = 1 + max((_i_layer(spec.name) for spec in specs), default=0)
    n_attention = sum(spec.role is Role.ATTN_V for spec in specs)
    experts = next((spec for spec in specs if spec.role is Role.EXPERT_UP), None)
    n_expert = experts.shape[0] if experts else 1
    tied = not any(spec.role is Role.OUTPUT for spec in specs)
    types, i_attention, i_down = {}, 0, 0
    for spec in specs:
        if not spec.quantizable:
            continue
        # Dense models count their MLP layers, models with experts their blocks.
        i_layer = _i_layer(spec.name) if n_expert > 1 else i_down
        place = _Place(i_layer, i_down, n_layer, i_attention, n_attention, n_expert)
        wanted = _type_of(preset, spec.role, place, tied)
        types[spec.name] = (wanted, _STAND_INS.get(wanted, wanted))
        i_attention += spec.role is Role.ATTN_V
        i_down += spec.role in _DOWN_ROLES
    return types


def _i_layer(name: str) -> int:
    found = _BLOCK.match(name)
    return int(found[1]) if found else 0


def _type_of(preset: str, role: Role, place: _Place, tied: bool) -> T:
    if role is Role.OUTPUT or (tied and role is Role.EMBEDDING):
        return _OUTPUTS.get(preset, T.Q6_K)
    if preset == "MXFP4_MOE":
        return T.MXFP4 if role in (Role.EXPERT_UP, Role.EXPERT_DOWN) else T.Q8_0
    rules = _RULES.get(role, {})
    if place.n_expert == 8:
        rules = _RULES_OF_8_EXPERTS.get(role, rules)
    rule = rules.get(preset)
    wanted = rule.type_at(place) if isinstance(rule, _Where) else rule
    return wanted or PRESETS[preset]


@dataclass(frozen=True, slots=True)
class _Where:
    """A type for some of the places a role has; None stands for the preset's main type."""

    holds: Callable[[_Place], bool]
    then: T
    otherwise: T | None = None

    def type_at(self, place: _Place) -> T | None:
        """The type of the tensor at `place`."""
        return self.then if self.holds(place) else self.otherwise


def _use_more_bits(i: int, n: int) -> bool:
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _has_experts(place: _Place) -> bool:
    return place.n_expert >= 4


def _is_early(place: _Place) -> bool:
    return place.i_layer < place.n_layer // 8


def _is_middle(place: _Place) -> bool:
    return place.n_layer // 8 <= place.i_layer < 7 * place.n_layer // 8


def _gets_more_bits(place: _Place) -> bool:
    return _use_more_bits(place.i_layer, place.n_layer)


_FEW_BITS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
_OUTPUTS = {
    "MXFP4_MOE": T.Q8_0, "Q8_0": T.Q8_0, **dict.fromkeys((*_FEW_BITS, "IQ3_XXS"), T.Q5_K),
}  # fmt: skip
"""The type of the output, or of the embedding that is both; of all other presets Q6_K."""

_Rules = Mapping[str, T | _Where]
_EMBEDDING: _Rules = {
    "IQ2_XXS": T.Q2_K, "IQ2_XS": T.Q2_K, "IQ2_S": T.IQ3_S, "IQ2_M": T.IQ3_S, "IQ3_XXS": T.IQ3_S,
}  # fmt: skip
_ATTN_V: _Rules = {
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS"), _Where(_has_experts, T.Q4_K, T.Q2_K)),
    **dict.fromkeys(("IQ2_S", "IQ2_M"), _Where(_has_experts, T.Q4_K, T.IQ3_S)),
    # The rule asks for 4 query heads a KV head in layer 0, which has no attention here.
    "Q2_K": T.Q3_K,
    "IQ3_XXS": T.IQ3_S,
    "IQ3_M": T.Q4_K,
    "Q3_K_M": _Where(lambda place: place.i_attention < 2, T.Q5_K, T.Q4_K),
    "Q3_K_L": T.Q5_K,
    "Q4_K_S": _Where(lambda place: place.i_attention < 4, T.Q5_K),
    **dict.fromkeys(
        ("Q4_K_M", "Q5_K_M"),
        _Where(lambda place: _use_more_bits(place.i_attention, place.n_attention), T.Q6_K),
    ),
}
_ATTN_QK: _Rules = {"IQ3_XS": T.IQ3_XXS, "IQ3_XXS": T.IQ2_S}
_ATTN_OUT: _Rules = {
    "IQ2_S": T.IQ3_S, "IQ2_M": T.IQ3_S, "Q2_K": T.Q3_K, "IQ3_XXS": T.IQ3_S, "IQ3_M": T.Q4_K,
    "Q3_K_M": T.Q4_K, "Q3_K_L": T.Q5_K,
}  # fmt: skip
_UP: _Rules = {"IQ3_XS": _Where(_is_middle, T.IQ3_XXS)}
_DOWN: _Rules = {
    # Counted over the down projections, not over blocks.
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS"), _Where(lambda p: p.i_down < p.n_layer // 8, T.Q2_K)),
    **dict.fromkeys(("IQ2_S", "IQ2_M"), _Where(lambda p: p.i_down < p.n_layer // 8, T.IQ3_S)),
    "Q2_K": T.Q3_K,
    "IQ3_XXS": _Where(_is_early, T.Q4_K, T.Q3_K),
    "Q3_K_M": _Where(lambda place: place.i_layer < place.n_layer // 16, T.Q5_K, T.Q4_K),
    "Q3_K_L": T.Q5_K,
    **dict.fromkeys(("Q4_K_M", "Q5_K_M"), _Where(_gets_more_bits, T.Q6_K)),
    **dict.fromkeys(("Q2_K_S", "IQ3_M"), _Where(_is_early, T.Q4_K)),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS", "Q4_K_S"), _Where(_is_early, T.Q5_K)),
}
_RULES: Mapping[Role, _Rules] = {
    Role.EMBEDDING: _EMBEDDING, Role.ATTN_V: _ATTN_V, Role.ATTN_K: _ATTN_QK, Role.ATTN_Q: _ATTN_QK,
    Role.ATTN_OUT: _ATTN_OUT,
    **dict.fromkeys((Role.EXPERT_UP, Role.SHARED_UP, Role.FFN_UP), _UP),
    **dict.fromkeys(_DOWN_ROLES, _DOWN),
}  # fmt: skip
"""By role, then by preset; a preset without a rule gives its main type."""

_BUMPED_OUT = (
    *_FEW_BITS, "Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M",
    "IQ3_S", "IQ3_M", "IQ4_XS",
)  # fmt: skip
_NOT_FEW_BITS = tuple(name for name in PRESETS if name not in _FEW_BITS)
_DOWN_OF_8_EXPERTS: _Rules = {
    **_DOWN,
    "IQ3_M": _Where(lambda place: _is_early(place) or _gets_more_bits(place), T.Q4_K),
}
_RULES_OF_8_EXPERTS: Mapping[Role, _Rules] = {
    Role.ATTN_V: {**_ATTN_V, **dict.fromkeys(_NOT_FEW_BITS, T.Q8_0)},
    Role.ATTN_K: {**dict.fromkeys(_FEW_BITS, T.Q4_K), **dict.fromkeys(_NOT_FEW_BITS, T.Q8_0)},
    Role.ATTN_OUT: dict.fromkeys(_BUMPED_OUT, T.Q5_K),
    **dict.fromkeys(_DOWN_ROLES, _DOWN_OF_8_EXPERTS),
}
"""The same for models of exactly 8 experts (Mixtral's number), where they differ."""
