"""nanorun's own recipes, as data.

Routed experts are 93 % of Nano's weights and decide its size; all else is read for every token and
feeds the residual stream and the SSM state, so it keeps more bits. Sizes are in GB (10^9 bytes) for
Nano's shape; `docs/quantization.md` lists them for every model.
"""

from __future__ import annotations

from collections.abc import Mapping

from nanorun.model.ggml_type import GgmlType as T
from nanorun.model.tensor_roles import Role
from nanorun_quant.recipe import Recipe, Types

_MIXER = (
    Role.SSM_IN, Role.SSM_OUT, Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V, Role.ATTN_OUT,
    Role.LATENT_DOWN, Role.LATENT_UP, Role.MTP_PROJ,
)  # fmt: skip
_SHARED = (Role.SHARED_UP, Role.SHARED_DOWN)
_FFN = (Role.FFN_UP, Role.FFN_DOWN)


def _types(
    *,
    up: Types,
    down: Types,
    ffn: Types,
    shared: Types,
    mixer: Types,
    output: Types,
    embedding: Types,
) -> Mapping[Role, Types]:
    groups = (((Role.EXPERT_UP,), up), ((Role.EXPERT_DOWN,), down), (_FFN, ffn), (_SHARED, shared),
              (_MIXER, mixer), ((Role.OUTPUT,), output),
              ((Role.EMBEDDING,), embedding))  # fmt: skip
    return {role: types for roles, types in groups for role in roles}


# A K type where rows are whole blocks of 256, else the nearest one of smaller blocks.
_8, _2 = (T.Q8_0,), (T.Q2_0,)
_6, _5, _5_0 = (T.Q6_K, T.Q8_0), (T.Q5_K, T.Q5_1), (T.Q5_K, T.Q5_0)
_4, _3 = (T.Q4_K, T.IQ4_NL), (T.Q3_K, T.IQ4_NL)
_REST_8 = {"shared": _8, "mixer": _8, "output": _8}

_RECIPES = (
    Recipe("q8", 1, T.Q8_0, summary="8 bits for everything: as good as BF16 for most purposes"),
    Recipe(
        "q6", 1, T.Q6_K, _types(up=_6, down=_6, ffn=_6, embedding=_6, **_REST_8),
        summary="6-bit experts, 8-bit rest",
    ),
    Recipe(
        "q5", 1, T.Q5_K, _types(up=_5_0, down=_5_0, ffn=_5_0, embedding=_5, **_REST_8),
        pads=False, summary="5-bit experts, 8-bit rest",
    ),
    Recipe(
        "q4", 1, T.Q4_K,
        _types(up=_4, down=_4, ffn=_4, shared=_5, mixer=_5, output=_6, embedding=_4),
        pads=False, summary="4-bit experts, 5 to 6 bits for the rest",
    ),
    Recipe(
        "q3", 1, T.Q3_K,
        _types(up=_3, down=_3, ffn=_3, shared=_4, mixer=_4, output=_6, embedding=_4),
        summary="3-bit experts, 4 bits for the rest",
    ),
    Recipe(
        "q2", 1, T.Q2_0,
        _types(up=_2, down=_2, ffn=_3, shared=_4, mixer=_4, output=_6, embedding=_4),
        pads=False, summary="2-bit experts, 4 bits for the rest",
    ),
    Recipe(
        "12g", 1, T.Q2_0,
        _types(up=_2, down=_2, ffn=_4, shared=_8, mixer=_8, output=_6, embedding=_4),
        pads=False, summary="Nano on a 12 GB card, 128k of F16 KV: 2-bit experts",
    ),
    Recipe(
        "16g", 1, T.IQ3_XXS,
        _types(up=(T.IQ3_XXS, T.Q2_0), down=(T.IQ3_XXS, T.IQ4_NL), ffn=_4, shared=_4, mixer=_4,
               output=_5, embedding=(T.IQ4_XS, T.IQ4_NL)),
        summary="Nano on a 16 GB card, 128k of F16 KV: 3-bit experts (imatrix), 4-bit rest",
    ),
    Recipe(
        "24g", 1, T.Q4_K, _types(up=_4, down=_5_0, ffn=_5, embedding=_6, **_REST_8),
        pads=False, summary="Nano on a 24 GB card, 256k of F16 KV: 4- and 5-bit experts",
    ),
    Recipe(
        "32g", 1, T.Q5_K,
        _types(up=_5, down=(T.Q6_K, T.Q5_1), ffn=_6, embedding=_8, **_REST_8),
        pads=False, summary="Nano on a 32 GB card, 1M of F16 KV: 5- and 6-bit experts",
    ),
    Recipe(
        "spark", 1, T.Q4_K, _types(up=_4, down=_5, ffn=_6, embedding=_8, **_REST_8),
        pads=False, summary="Super in 128 GB of unified memory, 1M of F16 KV: 4- and 5-bit experts",
    ),
    Recipe(
        "nvfp4_moe", 1, T.NVFP4,
        _types(up=(T.NVFP4, T.Q8_0), down=(T.NVFP4, T.Q8_0), ffn=(T.NVFP4, T.Q8_0), embedding=_8,
               **_REST_8),
        pads=False, summary="NVFP4 experts for Blackwell, 8-bit rest",
    ),
    Recipe(
        "mxfp4_moe", 1, T.MXFP4,
        _types(up=(T.MXFP4,), down=(T.MXFP4,), ffn=(T.MXFP4,), embedding=_8, **_REST_8),
        pads=False, summary="MXFP4 experts for Blackwell, 8-bit rest",
    ),
)  # fmt: skip

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}
"""By name: from most bits to fewest, then by device, then by format.

`nvfp4` and `mxfp4` alone are types, for every role.
"""
