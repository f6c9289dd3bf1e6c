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

_FEW_BITS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
_BLOCK = re.compile(r"blk\.(\d+)\.")
_DOWN = (Role.EXPERT_DOWN, Role.SHARED_DOWN, Role.FFN_DOWN)


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
        i_down += spec.role in _DOWN
    return types


def _i_layer(name: str) -> int:
    found = _BLOCK.match(name)
    return int(found[1]) if found else 0


def _type_of(preset: str, role: Role, place: _Place, tied: bool) -> T:
    if role is Role.OUTPUT or (tied and role is Role.EMBEDDING):
        if preset == "MXFP4_MOE":
            return T.Q8_0
        if preset == "Q8_0":
            return T.Q8_0
        return T.Q5_K if preset in (*_FEW_BITS, "IQ3_XXS") else T.Q6_K
    if preset == "MXFP4_MOE":
        return T.MXFP4 if role in (Role.EXPERT_UP, Role.EXPERT_DOWN) else T.Q8_0
    rule = _RULES_FEW_BITS.get(role) if preset in _FEW_BITS else _RULES.get(role)
    if role in _DOWN:
        rule = _down_few_bits if preset in _FEW_BITS else _down
    return (rule(preset, place) if rule else None) or PRESETS[preset]


def _use_more_bits(i: int, n: int) -> bool:
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _embedding(preset: str, _: _Place) -> T | None:
    if preset in ("IQ2_XXS", "IQ2_XS"):
        return T.Q2_K
    return T.IQ3_S if preset in ("IQ2_S", "IQ2_M", "IQ3_XXS") else None


def _attn_v_few_bits(preset: str, place: _Place) -> T:
    if place.n_expert >= 4:
        return T.Q4_K
    return T.IQ3_S if preset in ("IQ2_S", "IQ2_M") else T.Q2_K


def _attn_k_few_bits(_: str, place: _Place) -> T | None:
    return T.Q4_K if place.n_expert == 8 else None


def _attn_out_few_bits(preset: str, place: _Place) -> T | None:
    if place.n_expert == 8:
        return T.Q5_K
    return T.IQ3_S if preset in ("IQ2_S", "IQ2_M") else None


def _down_few_bits(preset: str, place: _Place) -> T | None:
    # Counted over the down projections, not over blocks.
    if place.i_down < place.n_layer // 8:
        return T.IQ3_S if preset in ("IQ2_S", "IQ2_M") else T.Q2_K
    return None


def _attn_v(preset: str, place: _Place) -> T | None:
    if place.n_expert == 8:
        return T.Q8_0
    i, n = place.i_attention, place.n_attention
    match preset:
        case "Q2_K":
            # The rule asks for 4 query heads a KV head in layer 0, which has no attention here.
            return T.Q3_K
        case "IQ3_XXS":
            return T.IQ3_S
        case "IQ3_M":
            return T.Q4_K
        case "Q3_K_M":
            return T.Q5_K if i < 2 else T.Q4_K
        case "Q3_K_L":
            return T.Q5_K
        case "Q4_K_M" | "Q5_K_M":
            return T.Q6_K if _use_more_bits(i, n) else None
        case "Q4_K_S":
            return T.Q5_K if i < 4 else None
    return None


def _attn_k(preset: str, place: _Place) -> T | None:
    return T.Q8_0 if place.n_expert == 8 else _attn_q(preset, place)


def _attn_q(preset: str, _: _Place) -> T | None:
    return {"IQ3_XS": T.IQ3_XXS, "IQ3_XXS": T.IQ2_S}.get(preset)


def _down(preset: str, place: _Place) -> T | None:
    i, n = place.i_layer, place.n_layer
    is_early = i < n // 8
    match preset:
        case "Q2_K":
            return T.Q3_K
        case "Q2_K_S" | "IQ3_M":
            return T.Q4_K if is_early or _is_bumped(preset, place) else None
        case "IQ3_XXS":
            return T.Q4_K if is_early else T.Q3_K
        case "Q3_K_M":
            return T.Q5_K if i < n // 16 else T.Q4_K
        case "Q3_K_L":
            return T.Q5_K
        case "Q4_K_M" | "Q5_K_M":
            return T.Q6_K if _use_more_bits(i, n) else None
        case "IQ4_NL" | "IQ4_XS" | "Q4_K_S":
            return T.Q5_K if is_early else None
    return None


def _is_bumped(preset: str, place: _Place) -> bool:
    more = _use_more_bits(place.i_layer, place.n_layer)
    return preset == "IQ3_M" and place.n_expert == 8 and more


_BUMPED_OUT = (
    "Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S",
    "IQ3_M", "IQ4_XS",
)  # fmt: skip


def _attn_out(preset: str, place: _Place) -> T | None:
    if place.n_expert == 8:
        return T.Q5_K if preset in _BUMPED_OUT else None
    types = {"Q2_K": T.Q3_K, "IQ3_XXS": T.IQ3_S, "Q3_K_M": T.Q4_K, "Q3_K_L": T.Q5_K,
             "IQ3_M": T.Q4_K}  # fmt: skip
    return types.get(preset)


def _up(preset: str, place: _Place) -> T | None:
    is_middle = place.n_layer // 8 <= place.i_layer < 7 * place.n_layer // 8
    return T.IQ3_XXS if preset == "IQ3_XS" and is_middle else None


_Rule = Callable[[str, _Place], T | None]
_RULES: dict[Role, _Rule] = {
    Role.EMBEDDING: _embedding, Role.ATTN_V: _attn_v, Role.ATTN_K: _attn_k, Role.ATTN_Q: _attn_q,
    Role.ATTN_OUT: _attn_out, Role.EXPERT_UP: _up, Role.SHARED_UP: _up, Role.FFN_UP: _up,
}  # fmt: skip
_RULES_FEW_BITS: dict[Role, _Rule] = {
    Role.EMBEDDING: _embedding, Role.ATTN_V: _attn_v_few_bits, Role.ATTN_K: _attn_k_few_bits,
    Role.ATTN_OUT: _attn_out_few_bits,
}  # fmt: skip
